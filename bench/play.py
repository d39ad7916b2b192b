"""python -m bench.play: frames per second of a whole run of `play` on Atari's games, against a plain DQN loop.

Both play, store and learn with the same network, batch, rate and number of transitions per step of learning, in turn
on the same machine; the peer is `bench/peers/dqn_loop.py`, run by the interpreter that --peer names. Warm-ups do not
count.
Prints one JSON line per game; the medians are kept in bench/results/play.json, and a table of docs/zoo/play.md is made
of them. With --curves, that page's figures are drawn instead, one for each game, from the logs of runs:

    python -m bench.play --curves runs/play-1 runs/play-2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from bench.charts import line_chart
from bench.readme import between
from bench.results import RESULTS
from millrace.models.games import FRAMES_PER_STEP
from millrace.train.callbacks import Callback, RunView
from millrace.zoo.run import configure, train

KEPT = RESULTS / "play.json"
PAGE = RESULTS.parent.parent / "docs" / "zoo" / "play.md"
PEER = Path(__file__).parent / "peers" / "dqn_loop.py"
GAMES = ("Pong", "Breakout", "SpaceInvaders")
# What both do; the peer has it in its own constants.
SETTINGS = (
    "batch_size=32",
    "every=4",
    "learning_rate=1e-4",
    "target_every=250",
    "double=false",
    "warm_up=1000",
    "threads=none",
)


class Stopwatch(Callback):
    """Ends a run after some seconds, and counts its steps from when it has settled."""

    def __init__(self, seconds: float, settled: int) -> None:
        self._seconds, self._settled = seconds, settled
        self._began_s = 0.0
        self.steps_per_s = 0.0

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        now_s = time.perf_counter()
        if step == self._settled:
            self._began_s = now_s
        elif step > self._settled:
            self.steps_per_s = (step - self._settled) / (now_s - self._began_s)
            if now_s - self._began_s > self._seconds:
                run.stop()


def own(game: str, seconds: float, settings: list[str]) -> float:
    """Frames per second of Millrace."""
    fixed = ["capacity=10000", "steps=1000000", "evaluate_every=1000000", "matches=1", "longest=30", "compile=inductor"]
    task = configure("play", [f"game=ALE/{game}-v5", *SETTINGS, *fixed, *settings])
    watch = Stopwatch(seconds, settled=64)
    train(task, run_dir=False, progress=False, device="cpu", callbacks=[watch])
    return watch.steps_per_s * int(task.settings.every) * FRAMES_PER_STEP


def peer(python: str, game: str, seconds: float) -> float:
    """Frames per second of the plain loop."""
    command = [python, str(PEER), "--game", game, "--seconds", str(seconds)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(said.stdout.splitlines()[-1])["frames_per_s"])


def main() -> int:
    """Measure the games that are named."""
    options = argparse.ArgumentParser(prog="python -m bench.play", description=__doc__)
    options.add_argument("games", nargs="*", default=GAMES)
    options.add_argument("--peer", default=sys.executable, help="a Python with stable-baselines3 and opencv")
    options.add_argument("--seconds", type=float, default=20.0, help="of every turn")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--curves", nargs="+", type=Path, metavar="RUN", help="draw these runs, and measure nothing")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of Millrace's")
    given = options.parse_args()
    if given.curves:
        by_game: dict[str, list[Path]] = {}
        for run in given.curves:
            by_game.setdefault(settings_of(run)["game"], []).append(run)
        for game, runs in by_game.items():
            slug = game.removeprefix("ALE/").partition("-")[0].lower()
            PAGE.with_name(f"play-{slug}.svg").write_text(curves(game, runs), encoding="utf-8")
        return 0
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for game in given.games:
        rates: dict[str, list[float]] = {"own": [], "peer": []}
        for _ in range(given.turns):
            rates["own"].append(own(game, given.seconds, given.set))
            rates["peer"].append(peer(given.peer, game, given.seconds))
        figure = {
            "frames_per_s": round(statistics.median(rates["own"]), 1),
            "plain_loop_frames_per_s": round(statistics.median(rates["peer"]), 1),
            "ratio": round(statistics.median(o / p for o, p in zip(rates["own"], rates["peer"], strict=True)), 2),
            "turns": given.turns,
            "seconds": given.seconds,
            "settings": given.set,
            "cores": len(os.sched_getaffinity(0)),
            "load": round(os.getloadavg()[0], 1),
        }
        print(json.dumps({"game": game, **figure}), flush=True)
        kept[game] = figure
    KEPT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), table(kept)), encoding="utf-8")
    return 0


def table(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Every game's figures, as Markdown."""
    rows = ["| game | Millrace, frames/s | plain loop, frames/s | ratio |", "| --- | ---: | ---: | ---: |"]
    rows += [
        f"| {game} | {f['frames_per_s']:.0f} | {f['plain_loop_frames_per_s']:.0f} | {f['ratio']:.2f} |"
        for game, f in kept.items()
    ]
    one = next(iter(kept.values()))
    note = f"Medians of {one['turns']} turns of {one['seconds']:g} s each, in turn, on {one['cores']} cores"
    return "\n".join([*rows, "", f"{note} (load {one['load']:g})."])


def settings_of(run: Path) -> dict[str, Any]:
    """A run's settings."""
    found: dict[str, Any] = json.loads((run / "config.json").read_text())["settings"]
    return found


def curves(game: str, runs: Sequence[Path]) -> str:
    """The scores of training games and of evaluations while runs of a game went on."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        settings = settings_of(run)
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for key, of in (("score", "training games"), ("validation/score", "evaluations")):
            points = [(entry["step"] * settings["every"] / 1000, entry[key]) for entry in logged if key in entry]
            lines[f"seed {settings['seed']}, {of}"] = points[:: max(1, len(points) // 60)]
    return line_chart(game, "thousand steps played while learning", "score", lines, log=False)


if __name__ == "__main__":
    sys.exit(main())
