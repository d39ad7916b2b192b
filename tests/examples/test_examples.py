"""The programs in examples/ run from a checkout as they stand, and the numbers that they print are right."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(example: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def output(example: str, *arguments: object, cwd: Path) -> str:
    done = run(example, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.mark.long
def test_five_lines_train_a_whole_model_from_a_folder_of_pictures(tmp_path: Path) -> None:
    printed = output("five_lines.py", cwd=tmp_path)
    accuracy = re.search(r"accuracy over 10 classes, on pictures it never saw: ([\d.]+)%", printed)
    assert accuracy is not None
    assert float(accuracy[1]) >= 95
    predictions = re.findall(r"  (\d)/\d+\.png shows a (\d) \(([\d.]+)% sure\)", printed)
    assert len(predictions) == 6
    assert sum(true == seen for true, seen, _ in predictions) >= 5
    (config,) = tmp_path.glob("runs/*/config.json")
    assert json.loads(config.read_text())["model"]["num_partitions"] == 4


def test_five_lines_are_five() -> None:
    tree = ast.parse((EXAMPLES / "five_lines.py").read_text())
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    lines = [ast.unparse(statement) for statement in main.body]
    assert lines.index("m.train()") == 4
    assert all(line.count("\n") == 0 for line in lines[:5])


@pytest.mark.long
def test_five_lines_say_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(5):
            Image.new("L", (8, 8), 40 * number).save(tmp_path / label / f"{number}.png")
    done = run("five_lines.py", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert "num_classes=10" in done.stderr
    assert "2 labels (cat, dog)" in done.stderr


def test_logistic_regression_prints_the_losses_that_plain_torch_computes(tmp_path: Path) -> None:
    printed = output("logistic_regression.py", 301, cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"step +\d+: loss ([\d.]+)", printed)]
    expected, accuracy = plain_logistic_regression(301)
    assert losses == pytest.approx(expected, abs=2e-4)
    shown = re.search(r"accuracy on 360 scans it never saw: ([\d.]+)%", printed)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(100 * accuracy, abs=0.3)  # one scan of 360
    assert accuracy > 0.9


def plain_logistic_regression(steps: int) -> tuple[list[float], float]:
    """The example's program with torch's own module, optimizer and loop."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = torch.randperm(len(labels)).split([1437, 360])
    model = torch.nn.utils.skip_init(torch.nn.Linear, 64, 10)  # draws nothing from the stream of random numbers
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.randint(len(train), (100,))  # the example batch
    losses = []
    for i in range(steps):
        chosen = train[torch.randint(len(train), (100,))]
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += [float(loss.detach())] if i % 100 == 0 else []
    return losses, float((model(images[test]).argmax(1) == labels[test]).float().mean())


@pytest.mark.long
def test_the_generator_learns_to_draw_a_ring(tmp_path: Path) -> None:
    printed = output("custom_training_loop.py", 801, cwd=tmp_path)
    off = [float(distance) for distance in re.findall(r"([\d.]+) from the ring on average", printed)]
    assert len(off) == 5
    assert off[0] > 0.5
    assert off[-1] < 0.12  # the ring itself: 0.04
    picture = printed.splitlines()[-15:]
    quarters = [(rows, cols) for rows in (slice(0, 7), slice(8, 15)) for cols in (slice(0, 15), slice(16, 31))]
    filled = [sum(cell != " " for line in picture[rows] for cell in line[cols]) for rows, cols in quarters]
    assert min(filled) >= 5, "no part of the ring is left out"
    middle = "".join(line[13:18] for line in picture[6:9])
    assert middle.count(" ") >= len(middle) - 3, "the middle is empty, but for stray points"


def test_inspecting_a_graph_prints_it_counts_nodes_watches_and_draws(tmp_path: Path) -> None:
    printed = output("inspect_graph.py", tmp_path / "step.svg", cwd=tmp_path)
    assert printed.startswith("graph of ")
    assert "%addmm = addmm(hidden.bias, feed:0, %t)  : f32[32, 16]" in printed
    counts = [int(n) for n in re.findall(r"(\d+) of \d+ nodes", printed)]
    assert counts == sorted(set(counts)), "each fetch needs more than the one before"
    (total,) = {int(n) for n in re.findall(r"\d+ of (\d+) nodes", printed)}
    assert counts[-1] == total
    assert "relu [32, 16], 49% zeros" in printed
    watched = printed.split("of the module 'hidden':")[1].split("Drawn")[0].strip().splitlines()
    assert {"addmm", "mm_2"} <= {line.split()[0] for line in watched}, "one forward, one backward"
    assert (tmp_path / "step.svg").read_text().startswith("<svg")


def test_every_example_is_tested_here() -> None:
    tested = set(re.findall(r"\w+\.py", Path(__file__).read_text()))
    assert {file.name for file in EXAMPLES.glob("*.py")} <= tested


def test_the_programs_in_the_documentation_are_those_of_the_examples() -> None:
    text = (ROOT / "docs" / "slides.md").read_text()
    sources = [textwrap.dedent((EXAMPLES / name).read_text()) for name in ("five_lines.py", "logistic_regression.py")]
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 3
    flat = ["\n".join(line.strip() for line in source.splitlines()) for source in sources]
    for program in programs:
        lines = "\n".join(line.strip() for line in program.strip().splitlines())
        assert any(lines in source for source in flat), program
    links = re.findall(r"\]\(\.\./([^)]+)\)", text)
    assert links
    assert all((ROOT / link).exists() for link in links)


@pytest.mark.long
def test_two_devices_learn_digits_and_show_their_time(tmp_path: Path) -> None:
    printed = output("two_devices.py", cwd=tmp_path)
    accuracy = re.search(r"accuracy ([\d.]+); open", printed)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.85
    for kind in ("expected", "measured"):
        events = json.loads((tmp_path / f"timeline.{kind}.json").read_text())["traceEvents"]
        rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
        assert {"/host:0/cpu:0", "/host:0/cpu:1"} <= rows


@pytest.mark.long
def test_a_model_too_big_for_one_worker_trains_over_two(tmp_path: Path) -> None:
    one, told, two = re.split("one worker, told|two workers:", output("too_big_for_one.py", cwd=tmp_path))
    assert "no: auto found no plan that fits into memory" in one
    assert "  no: " in told
    losses = [float(loss) for loss in re.findall(r"\d\.\d{4}", two.split("losses")[1])]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3


@pytest.mark.long
def test_a_cluster_that_one_does_not_have_is_planned_for(tmp_path: Path) -> None:
    name = "plan_for_a_cluster.py".removesuffix(".py")
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {name} as plan; plan.main([], 2, 48)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    steps = [float(ms) for ms in re.findall(r"([\d.]+) ms a step expected", done.stdout)]
    assert len(steps) == 4
    assert steps[1] <= steps[0]
    assert steps[3] <= steps[2]
    assert (tmp_path / "plan.json").exists()


@pytest.mark.long
def test_a_table_on_the_cpu_learns_with_a_dense_part_elsewhere(tmp_path: Path) -> None:
    printed = output("embedding_on_the_cpu.py", 400, "eager", cwd=tmp_path)
    assert ("second CPU worker" in printed) != torch.cuda.is_available()
    accuracy = re.search(r"accuracy ([\d.]+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.85


@pytest.mark.long
def test_replicas_that_are_killed_end_with_the_weights_of_those_that_are_not(tmp_path: Path) -> None:
    printed = output("replicas_that_die.py", cwd=tmp_path)
    found = re.search(r"accuracy ([\d.]+); the largest difference of a weight .*: ([\de.-]+)", printed)
    assert found is not None
    assert float(found[1]) > 0.97
    assert float(found[2]) < 1e-6  # AdamW divides by small numbers; weights are of the order of 0.1


@pytest.mark.long
def test_asynchronous_replicas_learn_though_they_are_killed(tmp_path: Path) -> None:
    printed = output("asynchronous_replicas.py", cwd=tmp_path)
    found = re.search(r"^([\d.]+) bits per character .*\nbetween fetch and update came ([\d.]+) others", printed, re.M)
    assert found is not None
    assert float(found[1]) < 2.2
    assert float(found[2]) > 0.0


@pytest.mark.long
def test_with_a_backup_worker_late_gradients_are_dropped(tmp_path: Path) -> None:
    printed = output("backup_workers.py", cwd=tmp_path)
    found = re.search(r"accuracy ([\d.]+) after \d+ steps; (\d+) gradients came too late", printed)
    assert found is not None
    assert float(found[1]) > 0.9
    assert int(found[2]) > 0


@pytest.mark.long
def test_replicas_that_agree_after_every_tenth_step_learn_as_well(tmp_path: Path) -> None:
    printed = output("local_steps.py", cwd=tmp_path)
    found = re.search(r"accuracy ([\d.]+) agreeing after every step, ([\d.]+) after every tenth", printed)
    assert found is not None
    assert float(found[2]) > float(found[1]) - 0.05 > 0.8


@pytest.mark.long
def test_a_table_on_servers_learns_by_the_rows_that_batches_name(tmp_path: Path) -> None:
    done = run("sparse_embeddings.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "travels whole" not in done.stderr
    found = re.search(r"accuracy ([\d.]+) over 30 topics, the most frequent of which makes up ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) > 2.0 * float(found[2])


@pytest.mark.long
def test_groups_that_do_not_wait_for_each_other_learn(tmp_path: Path) -> None:
    printed = output("hybrid_groups.py", cwd=tmp_path)
    found = re.search(r"accuracy ([\d.]+); between a group's fetch and its update came ([\d.]+) others", printed)
    assert found is not None
    assert float(found[1]) > 0.88
    assert float(found[2]) > 0.0
