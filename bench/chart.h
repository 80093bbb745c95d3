/* The figures of a run as an SVG, for light and dark pages: how much of its bound each case reached, and the batch curve. Used by
   bench.c, which supplies die. */

enum { MAX_BARS = 48, MAX_POINTS = 64 };

static struct {
    struct {
        char label[96];
        double tok_s, bound;
    } bar[MAX_BARS];
    struct {
        uint32_t rows;
        double tok_s, bound;
    } point[MAX_POINTS]; /* the last curve measured */
    uint32_t n_bars, n_points;
    char curve[128], note[512];
} chart;

static void chart_bar(const char *label, double tok_s, double bound)
{
    if (chart.n_bars == MAX_BARS)
        return;
    snprintf(chart.bar[chart.n_bars].label, sizeof chart.bar[0].label, "%s", label);
    chart.bar[chart.n_bars].tok_s = tok_s, chart.bar[chart.n_bars].bound = bound;
    chart.n_bars++;
}

static void chart_point(uint32_t rows, double tok_s, double bound)
{
    if (chart.n_points == MAX_POINTS)
        return;
    chart.point[chart.n_points].rows = rows;
    chart.point[chart.n_points].tok_s = tok_s, chart.point[chart.n_points].bound = bound;
    chart.n_points++;
}

/* Text of an SVG: & and < are written as entities. */
static void chart_text(FILE *f, double x, double y, const char *class, const char *text)
{
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">", x, y, class);
    for (; *text; text++)
        fprintf(f, *text == '&' ? "&amp;" : *text == '<' ? "&lt;" : "%c", *text);
    fprintf(f, "</text>\n");
}

/* The curve's x: the logarithm of the rows. */
static double chart_x(uint32_t rows, double left, double width)
{
    double last = log((double)chart.point[chart.n_points - 1].rows), first = log((double)chart.point[0].rows);
    return left + width * (last > first ? (log((double)rows) - first) / (last - first) : 0);
}

static void chart_write(const char *path)
{
    enum { WIDTH = 860, LEFT = 300, BAR = 340, STEP = 26, CURVE = 240 };
    char text[160];
    FILE *f = fopen(path, "w");
    uint32_t height = 78 + STEP * chart.n_bars + (chart.n_points > 1 ? CURVE + 76 : 0);
    double y = 66;
    if (!f)
        die("cannot write %s", path);
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %u\" width=\"%d\" height=\"%u\" role=\"img\">\n"
            "<title>Tokens a second beside the bound</title>\n<style>\n"
            "  text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #24292f }\n"
            "  .title { font-weight: 600; font-size: 15px } .small { font-size: 11px; fill: #57606a }\n"
            "  .end { text-anchor: end } .middle { text-anchor: middle; font-size: 11px; fill: #57606a }\n"
            "  .page { fill: #ffffff } .bound { fill: #d8dee4 } .got { fill: #0969da } .axis { stroke: #8c959f }\n"
            "  .got-line { fill: none; stroke: #0969da; stroke-width: 2.5 }\n"
            "  .bound-line { fill: none; stroke: #8c959f; stroke-width: 2; stroke-dasharray: 5 4 }\n"
            "  @media (prefers-color-scheme: dark) {\n"
            "    text { fill: #e6edf3 } .small, .middle { fill: #9198a1 } .page { fill: #0d1117 }\n"
            "    .bound { fill: #3d444d } .got { fill: #4493f8 } .axis { stroke: #656c76 }\n"
            "    .got-line { stroke: #4493f8 } .bound-line { stroke: #9198a1 }\n  }\n</style>\n"
            "<rect class=\"page\" width=\"%d\" height=\"%u\" rx=\"6\"/>\n",
            WIDTH, height, WIDTH, height, WIDTH, height);
    chart_text(f, 16, 26, "title", "Tokens a second, as a part of what the machine allowed at that moment");
    chart_text(f, 16, 45, "small", chart.note);
    for (uint32_t i = 0; i < chart.n_bars; i++, y += STEP) {
        double part = chart.bar[i].bound > 0 ? chart.bar[i].tok_s / chart.bar[i].bound : 0;
        chart_text(f, LEFT - 12, y + 13, "end", chart.bar[i].label);
        fprintf(f, "<rect class=\"bound\" x=\"%d\" y=\"%.1f\" width=\"%d\" height=\"18\" rx=\"3\"/>\n", LEFT, y, BAR);
        fprintf(f, "<rect class=\"got\" x=\"%d\" y=\"%.1f\" width=\"%.1f\" height=\"18\" rx=\"3\"/>\n", LEFT, y,
                BAR * (part > 1 ? 1 : part));
        snprintf(text, sizeof text, "%.1f of %.1f tok/s (%.2f)", chart.bar[i].tok_s, chart.bar[i].bound, part);
        chart_text(f, LEFT + BAR + 10, y + 13, "", text);
    }
    if (chart.n_points > 1) {
        double top = 0, step = 1, left = 70, width = WIDTH - 110, floor_y = y + CURVE + 40;
        for (uint32_t i = 0; i < chart.n_points; i++) {
            double most = chart.point[i].tok_s > chart.point[i].bound ? chart.point[i].tok_s : chart.point[i].bound;
            top = most > top ? most : top;
        }
        while (5 * step < top) /* 1, 2, 5, 10, 20 ... */
            step *= fmod(log10(step / 2) + 100, 1) < 1e-6 ? 2.5 : 2;
        const double lines = ceil(top / step);
        top = lines * step;
        chart_text(f, 16, y + 24, "title", chart.curve);
        for (uint32_t i = 0; i <= lines; i++) {
            double line = floor_y - CURVE * 0.95 * i / lines;
            fprintf(f, "<line class=\"axis\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke-width=\"%s\"/>\n",
                    left, line, left + width, line, i ? "0.4" : "1");
            snprintf(text, sizeof text, "%.0f", step * i);
            chart_text(f, left - 8, line + 4, "small end", text);
        }
        for (int bound = 1; bound >= 0; bound--) {
            fprintf(f, "<polyline class=\"%s\" points=\"", bound ? "bound-line" : "got-line");
            for (uint32_t i = 0; i < chart.n_points; i++)
                fprintf(f, "%.1f,%.1f ", chart_x(chart.point[i].rows, left, width),
                        floor_y - CURVE * 0.95 * (bound ? chart.point[i].bound : chart.point[i].tok_s) / top);
            fprintf(f, "\"/>\n");
        }
        double before = -100;
        for (uint32_t i = 0; i < chart.n_points; i++) {
            double x = chart_x(chart.point[i].rows, left, width);
            if (x - before < 22)
                continue;
            snprintf(text, sizeof text, "%u", chart.point[i].rows);
            chart_text(f, x, floor_y + 16, "middle", text);
            before = x;
        }
        chart_text(f, left + width / 2, floor_y + 32, "middle", "rows at once; dashed: the bound");
    }
    fprintf(f, "</svg>\n");
    if (fclose(f))
        die("cannot write %s", path);
}
