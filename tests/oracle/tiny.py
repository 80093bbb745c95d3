"""examples/tiny, the trained model of this repository, against transformers: logits of 256 tokens, 64 greedy steps. And
whether it converses: `dsv3 chat` asks it for a tale of each of some subjects, plainly and with R1's markup; how many
answers end by themselves, speak of the subject, and come behind a thought that was closed."""

import os
import re

import numpy as np
import tokenizers

import compare
import reference
from program import ProgramError

TEXT = """Once upon a time there lived at the edge of a great forest a miller who had three sons and one grey donkey. When he
felt that his end was near, he called them to his bed and said, "My dear children, I have nothing to leave you but the
mill, the donkey and the cat. Share them as you think right, and do not quarrel." Then he closed his eyes and died.
The eldest took the mill, the second took the donkey, and nothing was left for the youngest but the cat. "Alas," said
he, "my brothers can earn their bread together, but when I have eaten my cat and made a pair of gloves of its skin, I
must die of hunger." The cat, who had heard every word, came up to him and said, "Do not grieve, dear master. Give me a
sack, and have a pair of boots made for me, so that I can go through the thorns, and you shall see that your share is
not so poor as you believe." The youth had little hope of it, but he had seen the cat play so many cunning tricks to
catch rats and mice, how it hung itself up by the feet, or hid in the meal and made as if it were dead, that he did as
it wished. As soon as the boots were ready, the cat put them on, threw the sack over its shoulder, and went out into
the forest, where many rabbits lived. It laid bran and sow-thistle in the sack, stretched itself out upon the ground,
and waited until some young rabbit, not yet used to the deceits of the world, should come and look for something to eat.
"""
LENGTH, STEPS = 256, 64
SUBJECTS = """fox wolf lion mouse crow ass frog horse dog cat bear eagle king queen princess prince miller shepherd tailor
fisherman thief soldier witch giant""".split()
ANSWER = 300                                            # tokens
ENDED, SPOKEN_OF = 0.9, 0.75                            # shares of the answers, at least


def check(directory, program, report):
    """One row like those of the checkpoints, or None where the model is absent."""
    if not os.path.exists(os.path.join(directory, "model.safetensors")) and \
       not os.path.exists(os.path.join(directory, "model.safetensors.index.json")):
        report.skip("tiny", f"no model in {directory}")
        return None
    config = reference.read_config(directory)
    model = reference.load(directory)
    wheel = tokenizers.Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    all_ids = wheel.encode(TEXT, add_special_tokens=False).ids
    # Slide over the text until no routing decision is a near tie.
    for start in range(0, max(1, len(all_ids) - LENGTH)):
        ids = all_ids[start:start + LENGTH]
        logits, experts, margins, _ = reference.forward(model, ids)
        if margins is None or margins.min() >= compare.MARGIN_ALLOWED:
            break
    margins = None if margins is None else margins.min(-1)
    text, gaps, _ = reference.greedy(model, ids, STEPS)
    eos = config.get("eos_token_id")
    eos = set(eos) if isinstance(eos, list) else {eos}
    stop = next((i for i, t in enumerate(text) if t in eos), len(text))

    row = {"checkpoint": "examples/tiny", "stored": "fp8", "positions": len(ids), "about": "the shipped model", "seed": "-",
           "error": None, "experts": "-", "greedy": "-", "torch_f64": None, "ours_f64": None,
           "margin": None if margins is None else float(margins.min()), "wishes": []}
    try:
        layers = 0 if experts is None else experts.shape[1]
        ours, chosen, _ = program.logits(directory, ids, config["vocab_size"], layers, config["num_experts_per_tok"])
        row["error"] = compare.distance(ours, logits)
        report.check("tiny: logits", row["error"] <= compare.TOLERANCE, f"{row['error']:.2e}")
        if layers:
            compared = margins > compare.MARGIN_COMPARED
            same = (np.sort(chosen, -1) == experts).all(-1)
            row["experts"] = f"{int((same & compared).sum())}/{int(compared.sum())}"
            report.check("tiny: experts", not (~same & compared).any(), row["experts"])
        got = program.greedy(directory, ids, STEPS)
        want = text[:stop]
        # A step whose two best logits nearly tie may go either way, and all that follows with it.
        sure = next((i for i, g in enumerate(gaps) if g < compare.GAP_ALLOWED), len(text))
        if sure < len(want):
            report.skip("tiny: greedy beyond a near tie", f"step {sure}, gap {gaps[sure]:.1e}")
            want = want[:sure]
        equal = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        row["greedy"] = f"{equal}/{len(want)}"
        report.check("tiny: greedy", equal == len(want), row["greedy"])
        truth_model = reference.to_double(model)
        with reference.InDouble():
            truth, *_ = reference.forward(truth_model, ids)
        row["torch_f64"], row["ours_f64"] = compare.distance(logits, truth), compare.distance(ours, truth)
        report.check("tiny: f64", row["ours_f64"] <= compare.F64_FACTOR * row["torch_f64"],
                     f"{row['ours_f64']:.2e}, torch {row['torch_f64']:.2e}")
    except ProgramError as e:
        report.fail("tiny", str(e))
    return row


def converse(directory, program, report):
    """A row for each markup: shares of the answers."""
    rows = []
    questions = [f"Tell me of {'an' if s[0] in 'aeiou' else 'a'} {s}" for s in SUBJECTS]
    for markup in ("auto", "r1-think"):
        try:
            answers = program.converse(directory, questions, ANSWER, markup)
        except ProgramError as e:
            report.fail(f"tiny: chat, {markup}", str(e))
            continue
        share = lambda found: sum(found) / len(answers)
        row = {"markup": markup, "answers": len(answers), "ended": share(end == "eos" for _, _, end in answers),
               "subject": share(bool(re.search(rf"\b{s}(e?s)?\b", text, re.I)) for s, (text, _, _) in zip(SUBJECTS, answers)),
               "thought": share(bool(thought and text) for text, thought, _ in answers)}
        rows.append(row)
        report.check(f"tiny: chat, {markup}: ends by itself", row["ended"] >= ENDED, f"{row['ended']:.2f}")
        report.check(f"tiny: chat, {markup}: speaks of the subject", row["subject"] >= SPOKEN_OF, f"{row['subject']:.2f}")
        if markup == "r1-think":
            report.check("tiny: chat, r1-think: thinks first", row["thought"] >= ENDED, f"{row['thought']:.2f}")
    return rows
