"""docs/results.md, and the tables of README and of docs/mini.md: from the files in benchmarks/results alone.

    python -m benchmarks.results_page            # writes all; no measurement is run

Each section is a table of one result file (or of files of one command), with the command that makes the file
anew, and date, commit and processor of the run that made the present one. Files that are not in ``SECTIONS``
are of finished questions; ``dev/log.md`` says what came of them. A test compares the page with what this
module would write.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import one_line_errors
from benchmarks.paper import figure3, figure4, steering, table5
from benchmarks.paper.baselines import table as baselines_table
from benchmarks.paper.cost import table as cost_of_cells
from benchmarks.paper.heads import table as heads_table
from benchmarks.paper.own_tasks import table as own_tasks_table
from benchmarks.paper.router_tables import cost_table, quality_table
from benchmarks.paper.table3_render import beside_paper
from benchmarks.paper.table3_render import markdown as transfer_table
from benchmarks.serve.load import table as serve_load
from benchmarks.speed.openvino import table as openvino
from benchmarks.speed.rounds import ranged
from benchmarks.speed.table4_render import table as table4

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
CARD = ROOT / "docs" / "mini.md"

Result = dict[str, Any]
SPEED = [
    name
    for shape in ("cpt-large", "1024", "mini", "mini-m50")
    if (RESULTS / (name := f"throughput_{shape}.json")).is_file()
]


def read(name: str) -> Result:
    """A result file."""
    found: Result = json.loads((RESULTS / name).read_text("utf-8"))
    return found


@dataclass(frozen=True, kw_only=True)
class Section:
    """One heading of the page: its files, the command that makes them, what they show, and the table."""

    title: str
    files: Sequence[str]
    command: str
    text: str
    table: Callable[[list[Result]], str]


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; ``:`` at the end of a head puts its column to the right."""
    rule = ["---:" if head.endswith(":") else "---" for head in heads]
    lines = ([head.removesuffix(":") for head in heads], rule, *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows_of(results: list[Result]) -> Iterator[Result]:
    """The rows of all results."""
    return (row for result in results for row in result["rows"])


def throughput(results: list[Result]) -> str:
    """Deep stage II against the plain loop, a precision a row."""
    heads = ["backbone", "task", "engine", "plain ms:", "ours ms:", "times plain:", "times A:", "times B:"]
    heads += ["times C:", "full forward, % of matrix rate:", "rank agreement: least, median"]
    rows = []
    for row in rows_of(results):
        if row["runtime"] != "torch":
            continue  # measured with graphs that were rewritten for the CPU, which is no longer done
        shape = f"{row['layers']} x {row['hidden']}, m = {row['prompt_tokens']} ({row['shape']}){_old(row)}"
        agreement = (
            f"{row['spearman_min']:.4f}, {row['spearman_median']:.4f}" if "spearman_min" in row else ""
        )
        share = {k: 100 * v for k, v in row["stage1_share"].items() if k != "rounds"}
        times = [ranged(row["stage2_ratio"], 1), *_rivals(row)]
        ms = [f"{row['plain_ms']['median']:.0f}", f"{row['stage2_ms']['median']:.1f}"]
        engine = f"{row['runtime']} {row['precision']}"
        rows.append([shape, row["task"], engine, *ms, *times, ranged(share, 0), agreement])
    return grid(heads, rows)


def _old(row: Result) -> str:
    """A mark for rows of before there were rivals beside them."""
    return "" if "rival_ratios" in row else f" *old: {row['measured'][0][:10]}*"


def _rivals(row: Result) -> list[str]:
    """Times A, B and C of a row; empty where they were not measured yet."""
    return [ranged(x, 1) for x in row.get("rival_ratios", {}).values()] or [""] * 3


def transfer(results: list[Result]) -> str:
    """The transfer table with its means; the answers below it are left to the log."""
    (result,) = results
    upstream = result["means"].get("pre-trained on", {}).get("tasks", [])
    table = transfer_table(result["rows"], {}, result["settings"], upstream, "")
    return re.sub(r"\n{3,}", "\n\n", table).rstrip()


def router_search(results: list[Result]) -> str:
    """Router searches by mean rank, and what a suggestion costs."""
    found = results[0]["rows"][0]
    return (quality_table(found["cells"]) + "\n" + cost_table(found["suggestion_cost_192"])).strip()


def pretraining(results: list[Result]) -> str:
    """Examples a second of `mp2 pretrain` and of a plain loop."""
    heads = ("backbone", "prompts", "ours, examples/s:", "plain:", "times plain:", "% of matrix rate:")
    rows = [
        (
            f"{row['layers']} x {row['hidden']}",
            row["kind"],
            f"{row['ours_examples_per_s']['median']:.0f}",
            f"{row['plain_examples_per_s']['median']:.0f}",
            ranged(row["ratio"], 2),
            f"{100 * row['ours_share_of_matrix_rate']['median']:.0f}",
        )
        for row in rows_of(results)
    ]
    return grid(heads, rows)


def outside_forwards(results: list[Result]) -> str:
    """Share of a run's time that is not forward, in per cent."""
    rows = []
    for row in rows_of(results):
        parts = row["outside_share_by_part"]
        shown = [row["outside_share"], *(parts[name] for name in ("suggest", "journal", "other"))]
        rows.append([row["task"], *(f"{100 * x:.1f}" for x in shown)])
    return grid(("task", "all:", "suggestions:", "journal:", "other:"), rows)


def router_groups(results: list[Result]) -> str:
    """Agreement of routers' clusters with the families of their tasks (Figure 5)."""
    heads = ("prompts", "routers", "tasks:", "adjusted Rand index:", "95 % of shuffled:", "p:")
    rows = [
        (
            f"{row['prompts']} ({row['kind']})",
            row["router"],
            str(row["tasks"]),
            f"{row['adjusted_rand_index']:.3f}",
            f"{row['shuffled']['quantile_95']:.3f}",
            f"{row['shuffled']['p']:.4f}",
        )
        for row in rows_of(results)
    ]
    return grid(heads, rows)


def shared_layers(results: list[Result]) -> str:
    """Share of stage I's layers whose router bits were seen before, in per cent."""
    rows = [
        (row["task"], row["method"], *(f"{100 * row[name]:.1f}" for name in ("within_population", "ever")))
        for row in rows_of(results)
    ]
    return grid(("task", "search", "within a population:", "ever:"), rows)


def emulated(results: list[Result]) -> str:
    """What a precision costs TensorRT graphs, emulated on the CPU."""
    rows = []
    for row in rows_of(results):
        ranks = ", ".join(f"{x:.3f}" for x in row["spearman_by_layer"])
        rows.append((row["precision"], ranks, f"{row['loss_error_max']:.4f}"))
    return grid(("precision", "Spearman with float32 by layer", "largest error of a loss:"), rows)


def cpu_settings(results: list[Result]) -> str:
    """A visit of a layer with and without C kernels, and with threads that spin."""
    about = ("level", "precision", "without", "threads", "spin", "beside")
    rows = [(*(str(row[key]) for key in about), ranged(row["visit_ms"], 0)) for row in rows_of(results)]
    return grid([f"{key}:" if key == "threads" else key for key in about] + ["ms a visit:"], rows)


def full_shape(results: list[Result]) -> str:
    """Time and memory of whole commands at the shape of CPT-large."""
    rows = [(f"`{r['command']}`", f"{r['seconds']:.0f}", f"{r['peak_gib']:.1f}") for r in rows_of(results)]
    return grid(("command", "seconds:", "peak GiB:"), rows)


SECTIONS = [
    Section(
        title="Scores over a pre-trained encoder (m3e-small)",
        files=["transfer_m3e_small.json"],
        command="python -m benchmarks.paper table3 --data DIR --backbone DIR --prompts FILE "
        "--methods majority deep bbtv2-mp2-head",
        text="m3e-small: BERT of 4 layers x 512, made by others, licence for research only, not in this "
        "repository; `recipes/m3e_small.sh` gets it and trains the prompts (20 upstream tasks). The "
        "table after this one has what the same examples give without prompts.",
        table=transfer,
    ),
    Section(
        title="Simple baselines, same examples (m3e-small)",
        files=["baselines_m3e-small.json"],
        command="python -m benchmarks.paper.baselines --data DIR --backbone DIR",
        text="Test score, mean ± standard deviation over the same five seeds and the same test examples "
        "as above. The probe is a logistic regression on mean-pooled states of the frozen encoder.",
        table=lambda results: baselines_table(results[0]["rows"]),
    ),
    Section(
        title="Serving: many tasks on one backbone",
        files=["serve_load.json"],
        command="python -m benchmarks.serve.load",
        text="`mp2 serve` over mini, 16 clients in a closed loop, one thread a server; median of the rounds "
        "and their range. With one task the three systems do the same: by how much their figures differ "
        "there is what the machine's other work does to them. Processor time is what a request costs all "
        "servers of a system together.",
        table=serve_load,
    ),
    Section(
        title="OpenVINO's provider on a CPU",
        files=["openvino.json"],
        command="python -m benchmarks.speed.openvino",
        text="The whole graph of mini, rows x tokens of a batch; processor time of a forward on one thread, "
        "median of the rounds and their range. The last case has another shape in every batch, as a server "
        "has. As it comes, OpenVINO computes in bf16 where the processor has it, and says nothing: logits "
        "are off by half a unit. In float32, which mp2 asks for, it is hardly faster than ONNX Runtime in "
        "the large batch and slower in the others. `auto` does not take it.",
        table=openvino,
    ),
    Section(
        title="Small tasks of a user's own, default settings",
        files=["own_tasks.json"],
        command="python -m benchmarks.paper.own_tasks",
        text="`tests/own_tasks.json`: templated sentences, 32 examples in all, the embedded backbone, "
        "`--head auto`. Test accuracy, mean ± standard deviation over five draws of the examples. ECE: "
        "expected calibration error on test.",
        table=lambda results: own_tasks_table(results[0]["rows"]),
    ),
    Section(
        title="The ridge head over m3e-small, no pre-trained prompts",
        files=["heads_m3e-small.json"],
        command="python -m benchmarks.paper.heads --data DIR --backbone DIR --heads ridge --iters 40 "
        "--test-limit 200 --max-tokens 64",
        text="The encoder of `recipes/m3e_small.sh`, which has no masked-language-model head; deep prompts "
        "from scratch. Test accuracy, mean ± standard deviation over the seeds that were run (the file says "
        "how many); the last line is the mean over the tasks, of seeds that have all of them. 40 "
        "iterations are two generations of CMA-ES.",
        table=lambda results: heads_table(results[0]["rows"]),
    ),
    Section(
        title="Heads over a randomly initialised BERT, no pre-trained prompts",
        files=["heads_random.json"],
        command="python -m benchmarks.paper.heads --data DIR --backbone random --iters 100",
        text="BERT of 4 layers x 128, weights from a seed; deep prompts from scratch. Test accuracy, mean ± "
        "standard deviation over the seeds that were run (the file says how many); the last line is the "
        "mean over the tasks, of seeds that have all of them.",
        table=lambda results: heads_table(results[0]["rows"]),
    ),
    Section(
        title="Speed: deep stage II on one thread",
        files=SPEED,
        command="python -m benchmarks.speed.throughput --data DIR --threads 1 --rounds 3 --shape mini 1024 "
        "--task lcqmc tnews bq thucnews",
        text="Milliseconds an evaluation: one candidate on the whole few-shot set. Plain: Hugging Face "
        "`BertModel` with hooks, inline prompts, one candidate a call, padded, taking turns with our "
        "engine. A, B, C: what a good engineer would write with it, see `benchmarks/speed/rivals.py`. "
        "Median (least-most) of the rounds. Full forward: necessary FLOP/s over the rate of a "
        "plain float32 product measured beside it. Rank agreement: Spearman of populations' losses with "
        "float32. 6 x 1024 has the first 8 examples of a task, 24 x 1024 the first 4; of both a round visits "
        "two layers, the k-th from below and from above. What is called *old* was measured before the rivals "
        "and before attention was made of differences, on another processor: it is no row to compare with.",
        table=throughput,
    ),
    Section(
        title="Speed: int8 differences with VNNI and without AMX",
        files=["throughput_vnni_1024.json"],
        command="ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI ATEN_CPU_CAPABILITY=avx512 "
        "MKL_ENABLE_INSTRUCTIONS=AVX512 \\\n  python -m benchmarks.speed.throughput --data DIR --threads 1 "
        "--rounds 3 --shape 1024 --task lcqmc --engine torch:fp32 torch:int8 --name throughput_vnni",
        text="As above, with the libraries told to leave AMX alone; the share is of a float32 product, so "
        "that int8 may exceed 100 %.",
        table=throughput,
    ),
    Section(
        title="Speed: Table 4 at 24 layers",
        files=["table4.json"],
        command="python -m benchmarks.paper table4 --data DIR",
        text="CPT-large's shape with random weights on two CPU cores, beside the paper's RTX 3090, which ran "
        "the authors' loop: so does the plain loop beside ours. A, B and C (of deep prompts) are what a good "
        "engineer would write, see `benchmarks/speed/rivals.py`; earlier files have none.",
        table=lambda results: table4(results[0]["rows"]),
    ),
    Section(
        title="Stage I: layers that routers share",
        files=["shared_layers.json"],
        command="python -m benchmarks.speed.shared_layers",
        text="Per cent of the layers that deep stage I runs (mini, 100 evaluations, mean of three seeds) "
        "whose router bits, up to that layer, were run before. It is not used: stage I is 100 of the "
        "paper's 8,000 evaluations, so that sharing within populations would save 0.3 % of a run, and "
        "shallow prompts share no layer.",
        table=shared_layers,
    ),
    Section(
        title="Router search",
        files=["router_search.json"],
        command="python -m benchmarks.paper.router_search --data DIR",
        text="Training loss after 100 and 200 evaluations on mini, the same problems for all methods.",
        table=router_search,
    ),
    Section(
        title="Pre-training speed",
        files=["pretrain_speed.json"],
        command="python -m benchmarks.speed.pretrain_speed --data DIR --device cpu --threads 1",
        text="`mp2 pretrain` against a plain PyTorch loop on the same batches, taking turns, one thread.",
        table=pretraining,
    ),
    Section(
        title="Time outside forwards",
        files=["python_share.json"],
        command="python -m benchmarks.speed.python_share --data DIR",
        text="Per cent of a run's time on mini, one thread.",
        table=outside_forwards,
    ),
    Section(
        title="Do routers group by task family? (Figure 5)",
        files=["figure5_m3e_small_hard.json", "figure5_m3e_small_soft.json", "figure5.json"],
        command="python -m benchmarks.paper figure5",
        text="Hierarchical clusters of the learned routers against the families of their tasks.",
        table=router_groups,
    ),
    Section(
        title="Low precision in TensorRT graphs (emulated)",
        files=["tensorrt_emulated_demo_sentiment.json"],
        command="python -m benchmarks.speed.tensorrt_engine --emulate --work DIR",
        text="The typed graphs of mini on the CPU, rounded after every node; not a run of TensorRT.",
        table=emulated,
    ),
    Section(
        title="C kernels, instruction sets, spinning threads",
        files=["cpu_settings_kernels.json", "cpu_settings_spin.json"],
        command="python -m benchmarks.speed.cpu_settings kernels",
        text="A visit of mini's middle layer, 20 candidates on 32 examples of demo_topic. The "
        "module's second command is `spin`. Spin was measured beside other work on the same two cores.",
        table=cpu_settings,
    ),
    Section(
        title="The full shape of CPT-large",
        files=["full_shape.json"],
        command="python -m benchmarks.speed.full_shape --work DIR --task lcqmc --data DIR",
        text="24 layers x 1024, random weights in the published checkpoint format, one thread.",
        table=full_shape,
    ),
]

# those of `python -m benchmarks.paper` that have been run
PAPER = [
    Section(
        title="Table 3: every method",
        files=["table3.json"],
        command="python -m benchmarks.paper table3 --data DIR --prompts FILE ...",
        text="Test score in per cent. First the paper's number, ours and the difference; then all columns. "
        "Where there is no spread it is one seed; empty cells were not run.",
        table=lambda results: beside_paper(results[0]["rows"]) + "\n\n" + transfer(results),
    ),
    Section(
        title="What Table 3 costs",
        files=["table3_cost.json"],
        command="python -m benchmarks.paper table3 --data DIR --prompts FILE ... --dry-run",
        text="Core-hours of all cells, by arithmetic from short runs of each method on the tasks with the "
        "fewest and the most tokens, one thread. A step is an evaluation of the few-shot set, or an epoch.",
        table=lambda results: cost_of_cells(results[0]["rows"]),
    ),
    Section(
        title="Table 5: fast and slow learning",
        files=["table5.json"],
        command="python -m benchmarks.paper table5 --data DIR --prompts FILE ...",
        text="Test score by gradient, under prompts that were pre-trained with two rates or with one.",
        table=lambda results: table5.table(results[0]["rows"]),
    ),
    Section(
        title="Figure 3: the two stages",
        files=["figure3.json"],
        command="python -m benchmarks.paper figure3 --data DIR",
        text="Shallow MP2 on dev, by gradient and black-box; mean and standard deviation over the seeds. "
        "![Figure 3](../benchmarks/results/figure3.png)",
        table=lambda results: figure3.table(results[0]["rows"]),
    ),
    Section(
        title="Figure 4a: number of labels",
        files=["figure4a.json"],
        command="python -m benchmarks.paper figure4a --data DIR --prompts FILE ...",
        text="Test accuracy on subsets of IFLYTEK. ![Figure 4a](../benchmarks/results/figure4a.png)",
        table=lambda results: figure4.table(results[0]["rows"], results[0]["x"]),
    ),
    Section(
        title="Figure 4b: number of examples",
        files=["figure4b.json"],
        command="python -m benchmarks.paper figure4b --data DIR --prompts FILE ...",
        text="Test accuracy on LCQMC. ![Figure 4b](../benchmarks/results/figure4b.png)",
        table=lambda results: figure4.table(results[0]["rows"], results[0]["x"]),
    ),
    Section(
        title="What deep MP2 gains over BBTv2, by the backbone's tokens",
        files=["steering.json"],
        command="python -m benchmarks.paper steering --data DIR --point TOKENS BACKBONE PROMPTS ...",
        text="A label-free backbone at several ages, deep prompts over each by the same recipe: mean test "
        "scores, and (deep MP2 - BBTv2) paired by seed. ![Steering](../benchmarks/results/steering.png)",
        table=lambda results: steering.table(results[0]["rows"]),
    ),
]
SECTIONS[:0] = [section for section in PAPER if (RESULTS / section.files[0]).is_file()]

HEAD = """# Results

Written by `python -m benchmarks.results_page` from `benchmarks/results`: do not edit. Nothing here was
measured on a GPU. What the numbers mean, what was missed and what was tried: `dev/log.md`.
"""
MINI_SINCE = "2026-11-29T11"  # when the embedded backbone became another
OVER_MINI = (  # the files that are over the embedded backbone
    *("cpu_settings_kernels", "cpu_settings_spin", "openvino", "own_tasks", "pretrain_speed", "python_share"),
    *("router_search", "serve_load", "shared_layers", "table3", "table3_cost", "throughput_mini"),
    *("throughput_mini-m50", "tensorrt_emulated_demo_sentiment"),
)


SHORT = {"cmrc2018": "cmrc", "cote_mfw": "cote", "thucnews": "thuc"}  # column heads of README's table
SIMPLE = {"tfidf": "TF-IDF", "nearest": "TF-IDF", "probe": "linear probe"}  # nearest: of extraction


def readme_scores() -> str:
    """README's table of scores over m3e-small: a line a method, the best of each task in bold."""
    transfers, simple = read("transfer_m3e_small.json"), read("baselines_m3e-small.json")
    tasks = transfers["means"]["all"]["tasks"]
    found: dict[str, dict[str, float]] = {}
    for row in transfers["rows"]:
        if row["task"] in tasks:
            found.setdefault(row["column"], {})[row["task"]] = row["mean"]
    for row in simple["rows"]:
        if row["task"] in tasks and "mean" in row and row["baseline"] in SIMPLE:
            found.setdefault(SIMPLE[row["baseline"]], {})[row["task"]] = row["mean"]
    lines = {
        "majority": "majority",
        "TF-IDF": "TF-IDF",
        "linear probe": "linear probe",
        "untuned": "untuned",
        "BBTv2, MP2's head": "BBTv2, MP2's head",
        "deep router-only": "MP2, stage I",
        "deep": "MP2, two stages",
    }
    best = {task: max(found[name].get(task, 0.0) for name in lines) for task in tasks}
    rows = []
    for name, shown in lines.items():
        cells = [(found[name].get(task), task) for task in tasks]
        texts = ["" if x is None else f"**{x:.1f}**" if x == best[task] else f"{x:.1f}" for x, task in cells]
        complete = [x for x, _ in cells if x is not None]
        mean = f"{sum(complete) / len(tasks):.1f}" if len(complete) == len(tasks) else ""
        rows.append([shown, *texts, mean])
    return grid(["method", *(f"{SHORT.get(task, task)}:" for task in tasks), "mean:"], rows)


def readme_speed() -> str:
    """README's table of speed: a line a backbone and task; ms an evaluation, times plain loop and rivals."""
    rows: list[list[str]] = []
    for row in (row for name in SPEED if "m50" not in name for row in read(name)["rows"]):
        if row["task"] not in ("lcqmc", "tnews"):  # the page has all
            continue
        if row["runtime"] != "torch" or row["precision"] not in ("fp32", "bf16"):
            continue
        times = [row["stage2_ratio"], *row.get("rival_ratios", {}).values()]
        ours = [f"{row['stage2_ms']['median']:.1f}", ", ".join(f"{x['median']:.1f}" for x in times)]
        if row["precision"] == "fp32":
            about = f"{row['layers']} x {row['hidden']}, m = {row['prompt_tokens']}{_old(row)}"
            rows.append([about, row["task"], *ours])
        else:
            rows[-1] += [*ours, f"{row['spearman_min']:.4f}"]
    times_plain = "times plain, A, B, C"
    heads = ["backbone", "task", "float32, ms:", times_plain, "bf16, ms:", times_plain, "ranks:"]
    # a result of before bf16 and the rivals were measured has fewer cells than the head
    return grid(heads, [row + [""] * (len(heads) - len(row)) for row in rows])


def card_scores() -> str:
    """The table of the embedded prompts' dev scores, as ``mp2 pretrain`` wrote them; their means last."""
    deep, shallow = (
        {task: [100 * scores[when] for when in ("before", "after")] for task, scores in read(name).items()}
        for name in ("mini_deep.json", "mini_shallow.json")
    )
    assert list(deep) == list(shallow)
    rows = [(task, [*deep[task], shallow[task][1]]) for task in deep]
    means = [sum(column) / len(rows) for column in zip(*(scores for _, scores in rows), strict=True)]
    lines = [(task, *(f"{x:.0f}" for x in scores)) for task, scores in rows]
    return grid(
        ["task", "deep, before:", "deep:", "shallow:"], [*lines, ("mean", *(f"{x:.1f}" for x in means))]
    )


def readme(text: str) -> str:
    """README with its two tables written anew, each below its mark."""
    return with_tables(text, scores=readme_scores(), speed=readme_speed())


def card(text: str) -> str:
    """docs/mini.md with its table written anew."""
    return with_tables(text, scores=card_scores())


def with_tables(text: str, **tables: str) -> str:
    """``text`` with each table in place of the one below the mark of its name."""
    for name, table in tables.items():
        marks = re.compile(rf"(<!-- {name} -->\n)(?:\|.*\n)*")
        text, n = marks.subn(lambda m, table=table: f"{m[1]}{table}\n", text)
        assert n == 1, f"there are {n} tables '{name}', expected one"
    return text


def made(name: str) -> str:
    """Date, commit and processor of the run that made a result file; whether it is over an earlier mini."""
    result = read(name)
    about = result.get("provenance")
    if about is None:  # cells of several runs
        times = sorted(time for code in result["codes"].values() for time in code["time"])
        words = f"cells of commits {', '.join(sorted(result['codes']))}; {times[0][:10]} to {times[-1][:10]}"
    else:
        times = [about["time"]]
        dirty = " with changes" if about.get("dirty") else ""
        threads = f"{about['threads']} thread" + ("" if about["threads"] == 1 else "s")
        words = f"{times[0][:10]}, commit {about['commit']}{dirty}, {about['cpu']}, {threads}"
    earlier = name.removesuffix(".json") in OVER_MINI and times[-1] < MINI_SINCE
    return f"{words}, [the mini of before](mini.md)" if earlier else words


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section in SECTIONS:
        results = [read(name) for name in section.files]
        whence = "; ".join(dict.fromkeys(made(name) for name in section.files))
        files = ", ".join(f"`{name}`" for name in section.files)
        parts.append(
            f"## {section.title}\n\n{textwrap.fill(section.text, 110)}\n\n```\n{section.command}\n```\n\n"
            f"{section.table(results)}\n\n*{files}: {whence}.*\n"
        )
    return "\n".join(parts)


@one_line_errors()
def main() -> None:
    """Write the page, README's tables and the card's."""
    PAGE.write_text(page(), "utf-8")
    for path, fresh in ((README, readme), (CARD, card)):
        path.write_text(fresh(path.read_text("utf-8")), "utf-8")
    print(*(path.relative_to(ROOT) for path in (PAGE, README, CARD)))


if __name__ == "__main__":
    main()
