/* Records: one JSON object a line, or the rows of a Markdown table with aligned columns. A field has a JSON key, a heading,
   or both: it appears where it has a name. Used by bench.c, which supplies die, progress and opt.json. */

enum { MAX_ROWS = 128, MAX_COLUMNS = 24, MAX_CELL = 48 };

static struct {
    char cell[MAX_ROWS][MAX_COLUMNS][MAX_CELL]; /* row 0: headings */
    bool is_text[MAX_COLUMNS];
    uint32_t row, n_columns, column;
    bool json_open;
} out;

static void out_cell(const char *heading, bool is_text, const char *text)
{
    uint32_t j = out.column++;
    if (j >= MAX_COLUMNS || out.row + 1 >= MAX_ROWS)
        die("the table is too large: shorter lists, please");
    out.is_text[j] = is_text;
    out.n_columns = j + 1 > out.n_columns ? j + 1 : out.n_columns;
    snprintf(out.cell[0][j], MAX_CELL, "%s", heading);
    snprintf(out.cell[out.row + 1][j], MAX_CELL, "%s", text);
}

static void out_text(const char *key, const char *heading, const char *text)
{
    if (opt.json && key) {
        printf("%s\"%s\":\"", out.json_open ? "," : "{", key);
        for (; *text; text++)
            printf(*text == '"' || *text == '\\' ? "\\%c" : (unsigned char)*text < 0x20 ? "?" : "%c", *text);
        printf("\"");
        out.json_open = true;
    } else if (!opt.json && heading) {
        out_cell(heading, true, text);
    }
}

static void out_number(const char *key, const char *heading, int decimals, double value)
{
    char text[MAX_CELL];
    if (opt.json && key) {
        printf(value == floor(value) && fabs(value) < 1e15 ? ",\"%s\":%.0f" : ",\"%s\":%.6g", key, value);
    } else if (!opt.json && heading) {
        snprintf(text, sizeof text, "%.*f", decimals, value);
        out_cell(heading, false, text);
    }
}

static void out_end(void)
{
    if (opt.json)
        printf("}\n");
    fflush(stdout);
    out.row++, out.column = 0, out.json_open = false;
}

/* Prints the rows collected so far. */
static void out_table(void)
{
    progress("%s", "");
    for (uint32_t i = 0; !opt.json && out.row && i <= out.row; i++) {
        for (uint32_t j = 0; j < out.n_columns; j++) {
            int width = 0;
            for (uint32_t k = 0; k <= out.row; k++)
                width = (int)strlen(out.cell[k][j]) > width ? (int)strlen(out.cell[k][j]) : width;
            printf(out.is_text[j] ? "| %-*s " : "| %*s ", width, out.cell[i][j]);
            if (i == 0) /* kept for the line below the headings */
                snprintf(out.cell[MAX_ROWS - 1][j], MAX_CELL, out.is_text[j] ? ":%.*s" : "%.*s:", width + 1,
                         "-----------------------------------------------");
        }
        printf("|\n");
        for (uint32_t j = 0; i == 0 && j < out.n_columns; j++)
            printf("|%s%s", out.cell[MAX_ROWS - 1][j], j + 1 == out.n_columns ? "|\n" : "");
    }
    if (!opt.json && out.row)
        printf("\n");
    fflush(stdout);
    memset(&out, 0, sizeof out);
}
