"""Answer lines of JSON, {"task": NAME, ...its fields...}: python run.py < lines.jsonl
Needs onnxruntime, tokenizers and numpy. Tasks with options; those of a batch may differ from line to line."""
import json, os, sys
from pathlib import Path
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is loaded
import numpy as np, onnxruntime, tokenizers

HERE, AT_ONCE, TASKS = Path(__file__).parent, 16, {}  # lines in a batch
MANIFEST = json.loads((HERE / "manifest.json").read_text("utf-8"))
SESSIONS = {name: onnxruntime.InferenceSession(HERE / name) for name in MANIFEST["graphs"]}
TOKENIZER = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer.json"))
TOKENIZER.encode_special_tokens = True  # "[SEP]" in a text is text
for name, entry in MANIFEST["tasks"].items():
    card, data = json.loads((HERE / entry["card"]).read_text("utf-8")), (HERE / entry["tensors"]).read_bytes()
    header, data = json.loads(data[8 : (size := 8 + int.from_bytes(data[:8], "little"))]), data[size:]
    flat = {key: np.frombuffer(data[slice(*x["data_offsets"])], "<f4") for key, x in header.items()}
    card["tensors"] = {key: x.reshape(header[key]["shape"]) for key, x in flat.items()}
    TASKS |= {name: card} if card["type"] != "extraction" else {}

def sequence(task, line):
    """The token ids of a line, and the (first, last) token of each of its options."""
    tokens = lambda text: TOKENIZER.encode(text, add_special_tokens=False).ids
    texts = {name: tokens(line[name]) for name in task["fields"]}
    options = [option["ids"] for option in task["options"]] or [tokens(text) for text in line["options"]]
    room = task["room"] - sum(map(len, options)) - len(task["separator"]) * (len(options) - 1)
    if room < min(task["least_room"], sum(map(len, texts.values()))):
        sys.exit(f"the options of {line} leave {room} tokens to its text")
    while sum(map(len, texts.values())) > room:  # the longest text (of equals the last) gives up its last token
        max(reversed(texts.values()), key=len).pop()
    ids, spans = list(task["before"]), []
    for part in task["parts"]:  # template text, and what follows it
        ids += part["ids"] + texts.get(part["field"], [])
        for k, option in enumerate(options if part["field"] == "options" else []):
            spans.append((len(ids), len(ids) + max(len(option), 1) - 1))
            ids += option + task["separator" if k + 1 < len(options) else "closing"]
    return np.array(ids + task["after"]), np.array(spans)

def stack(arrays):
    """Arrays as one, the axis of tokens or prompt rows (the last but one, or the only one) filled with zeros."""
    axis, size = max(arrays[0].ndim - 2, 0), max(x.shape[max(x.ndim - 2, 0)] for x in arrays)
    return np.stack([np.pad(x, [(0, (size - n) * (k == axis)) for k, n in enumerate(x.shape)]) for x in arrays])

lines, found = [json.loads(line) for line in sys.stdin if line.strip()], {}
if wrong := {str(line.get("task")) for line in lines} - TASKS.keys():
    sys.exit(f"task {', '.join(sorted(wrong))}: expected a task with options, one of {', '.join(TASKS)}")
for graph, session in SESSIONS.items():
    mine = [(n, line, TASKS[line["task"]]) for n, line in enumerate(lines) if TASKS[line["task"]]["graph"] == graph]
    for part in (mine[k : k + AT_ONCE] for k in range(0, len(mine), AT_ONCE)):
        ids, spans = zip(*(sequence(task, line) for _, line, task in part))
        feeds = {name: stack([task["tensors"][name] for *_, task in part]) for name in part[0][2]["tensors"]}
        feeds |= {"input_ids": stack(ids), "attention_mask": stack([np.ones_like(x) for x in ids])}
        lengths = np.array([task["prompt_length"] for *_, task in part])
        feeds |= {"prompt_length": lengths, "segments": np.zeros((len(part), 1, 2), np.int64)}  # these: no pooling
        logits = session.run(["start_logits", "end_logits"], feeds)  # [lines, tokens] each
        for row, (n, line, task) in enumerate(part):
            scores = sum(x[row, spans[row][:, k]].astype(float) for k, x in enumerate(logits))  # of the options
            options = task["options"] or [{"label": k, "option": text} for k, text in enumerate(line["options"])]
            found[n] = {key: x for key, x in options[scores.argmax()].items() if key in ("label", "option")}
            found[n]["probability"] = float(1 / np.exp(scores - scores.max()).sum())
print(*(json.dumps(found[n], ensure_ascii=False) for n in sorted(found)), sep="\n")
