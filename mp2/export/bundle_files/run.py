"""Answer lines of JSON, {"task": NAME, ...its fields...}: python run.py < lines.jsonl

Needs onnxruntime, tokenizers and numpy, and reading.py beside it. Tasks may differ from line to line.
"""

import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is loaded
import onnxruntime
import reading

HERE, AT_ONCE = Path(__file__).parent, 16  # rows in a batch


def main() -> None:
    """Answer every line of standard input, in order."""
    tokenizer, tasks = reading.load(HERE)
    lines, made, found = {}, [], {}
    for number, text in enumerate(sys.stdin, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if (name := line["task"]) not in tasks:
                sys.exit(f"line {number}: task {name}, expected one of {', '.join(tasks)}")
            made += [(number, row) for row in reading.rows(tokenizer, tasks[name], line)]
        except KeyError as error:
            sys.exit(f"line {number}: {error} is missing")
        except TypeError:
            sys.exit(f"line {number}: expected an object with the task's name and its texts")
        except ValueError as error:  # no JSON, or options that leave no room
            sys.exit(f"line {number}: {error}")
        lines[number] = line
    for graph in sorted({tasks[line["task"]]["graph"] for line in lines.values()}):
        session = onnxruntime.InferenceSession(HERE / graph)
        mine = [(n, row) for n, row in made if tasks[lines[n]["task"]]["graph"] == graph]
        for part in (mine[k : k + AT_ONCE] for k in range(0, len(mine), AT_ONCE)):
            own = [tasks[lines[n]["task"]] for n, _ in part]
            names = reading.outputs(own)
            outputs = session.run(names, reading.feeds(own, [row for _, row in part]))
            for k, (n, row) in enumerate(part):
                found.setdefault(n, []).append((row, dict(zip(names, (x[k] for x in outputs), strict=True))))
    for number, line in lines.items():
        rows, outputs = zip(*found[number], strict=True)
        answer = reading.answer(tasks[line["task"]], line, list(rows), list(outputs))
        if not math.isfinite(answer["probability"]):
            sys.exit(f"line {number}: its scores are no numbers")
        print(json.dumps(answer, ensure_ascii=False))


if __name__ == "__main__":
    main()
