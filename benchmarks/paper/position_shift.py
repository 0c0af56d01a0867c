"""What inline rows cost before they say anything: a text moved by m positions, and m empty rows before it.

Inline prompts, deep or shallow, push the text m positions on. A backbone that has always seen its texts begin
at position 1 may read them worse there, whatever the prompts are. Test scores without any prompt: as it is;
every token but [CLS] moved by m; and m rows before the text whose additions are zero, with the authors'
placeholder tokens, with [MASK] and with [PAD] (masked by nothing: it is attended like any token).

    python -m benchmarks.paper.position_shift --data DIR [--backbone mini] [--prompts FILE]

The span head is that of ``--prompts``; nothing else of them is used. 10 seconds with ``mini``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import one_line_errors
from benchmarks.provenance import RESULTS, provenance
from mp2.backbone import Backbone, load_backbone
from mp2.files import write_json
from mp2.heads import span_scores
from mp2.prompts import PromptSet, load_prompts
from mp2.tasks import MrcFormatter, decode, load_card, load_examples, score

WAYS = ("no prompt", "moved", "placeholders", "[MASK]", "[PAD]")


def last_hidden(backbone: Backbone, ids: Tensor, m: int, way: str) -> Tensor:
    """Last hidden states [1, T, H] of the text ``ids`` [1, T]."""
    encoder = backbone.encoder
    if way == "no prompt":
        return encoder(ids)  # type: ignore[no-any-return]
    if way == "moved":
        hidden = encoder.embed(ids, m)
        for layer in range(backbone.config.n_layers):
            hidden = encoder.layer(layer, hidden)
        return hidden
    if way == "placeholders":
        return encoder(ids, inline=encoder.placeholders(m))  # type: ignore[no-any-return]
    token = backbone.tokenizer.tokens().index(way)
    return encoder(ids, inline=encoder.word_embeddings(torch.full((1, m), token)))  # type: ignore[no-any-return]


@torch.no_grad()
def scores(
    backbone: Backbone, prompts: PromptSet, task: str, data: Path, m: int, test_limit: int, max_tokens: int
) -> dict[str, float]:
    """Test score in per cent of each of ``WAYS``, on the examples that fit."""
    card = load_card(task)
    formatter = MrcFormatter(card, backbone.tokenizer, max_tokens)
    examples = [e for e in load_examples(card, "test", data, test_limit) if formatter.fits(e)]
    inputs = [made for i, example in enumerate(examples) for made in formatter.inputs(example, i)]
    found = {}
    for way in WAYS:
        outputs = []
        for item in inputs:
            hidden = last_hidden(backbone, torch.from_numpy(item.input_ids)[None], m, way)
            logp = (hidden @ prompts.span_weight.T + prompts.span_bias).double().log_softmax(1)[0].numpy()
            outputs.append(span_scores(item, logp))
        predictions = [x.prediction for x in decode(card, examples, inputs, outputs)]
        found[way] = round(100 * score(card, predictions, examples), 1)
    return found


@one_line_errors()
def main() -> None:
    """Score, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--prompts", default="mini-deep")
    parser.add_argument("--tasks", nargs="+", default=["chnsent", "cote_mfw"])
    parser.add_argument("--rows", type=int, help="m  [default: that of --prompts]")
    parser.add_argument("--test-limit", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "position_shift.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone(args.backbone)
    prompts = load_prompts(args.prompts, backbone)
    m = prompts.meta.prompt_tokens if args.rows is None else args.rows
    rows: dict[str, Any] = {
        task: scores(backbone, prompts, task, args.data, m, args.test_limit, args.max_tokens)
        for task in args.tasks
    }
    print(f"| task | {' | '.join(WAYS)} |\n| --- |{' --- |' * len(WAYS)}")
    for task, found in rows.items():
        print(f"| {task} | {' | '.join(str(found[way]) for way in WAYS)} |")
    about = {"m": m, "test_limit": args.test_limit, "max_tokens": args.max_tokens}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"provenance": provenance(), "backbone": backbone.sha256, **about, "rows": rows})


if __name__ == "__main__":
    main()
