"""Model: what it builds is an ordinary module, and training it is training that module by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from millrace.data.images import image_folder, read_image
from millrace.errors import DataError, SettingError
from millrace.graph.graph import info
from millrace.graph.training import training_graph
from millrace.optim import adam
from millrace.runtime.weights import load_weights, save_weights
from millrace.train.fit import fit
from millrace.train.layers import ImageInput, Layer
from millrace.train.model import Model, cross_entropy

CLASSES = ("bar", "dot", "edge")
PER_CLASS = 20
QUIET: dict[str, Any] = {"compile": "eager", "progress": False, "run_dir": False}


def write_picture(file: Path, label: str, seed: int) -> None:
    """6 rows by 5 cols of noise, with a bright bar, dot or edge."""
    pixels = np.random.default_rng(seed).integers(0, 60, (6, 5), dtype=np.uint8)
    where = {"bar": np.s_[2:4, :], "dot": np.s_[1:3, 1:3], "edge": np.s_[:, 4:]}[label]
    pixels[where] = 255
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for label in CLASSES:
        for number in range(PER_CLASS):
            write_picture(root / label / f"{number:02}.png", label, seed=number * 7 + len(label))
    return root


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def described(folder: Path, **options: Any) -> Model:
    m = Model(**options)
    images = m.image_input(folder, rows=6, cols=5)
    hidden = m.relu_layer(images, 12)
    m.softmax(hidden, num_classes=3, labels=images.labels)
    return m


def by_hand() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 3))


def state(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_it_trains_as_the_module_written_by_hand(folder: Path) -> None:
    m = described(folder)
    module = by_hand()
    module.load_state_dict(dict(zip(module.state_dict(), state(m.module), strict=True)))
    read = image_folder(folder, 6, 5)
    assert isinstance(m.module, nn.Sequential)
    images = m._input
    assert isinstance(images, ImageInput)
    rows = images.split.train
    result = m.train(epochs=3, batch_size=8, **QUIET)
    fit(
        module,
        (read.images[rows], read.labels[rows]),
        loss=cross_entropy,
        optimizer=adam(1e-3),
        epochs=3,
        batch_size=8,
        **QUIET,
    )
    assert same(state(m.module), state(module))
    assert result.steps == 3 * (48 // 8)


def test_it_learns_evaluates_and_predicts(folder: Path) -> None:
    m = described(folder)
    before = m.evaluate()
    result = m.train(epochs=40, optimizer=adam(1e-2), **QUIET)
    after = m.evaluate()
    assert after["loss"] < before["loss"] / 4
    assert after["accuracy"] == 1.0
    assert after == pytest.approx(dict(result.evaluation))

    files = sorted(folder.glob("*/*.png"))
    predictions = m.predict(files)
    assert [p.file for p in predictions] == files
    assert [p.label for p in predictions] == [file.parent.name for file in files]
    pictures = torch.stack([read_image(file, 6, 5, 1) for file in files])
    with torch.no_grad():
        probabilities = m.module.eval()(pictures).softmax(-1)
    assert [p.probability for p in predictions] == pytest.approx(probabilities.max(-1).values.tolist())
    assert m.predict(str(files[0])) == predictions[:1]
    assert m.predict([]) == []


def test_training_never_sees_what_is_held_out(folder: Path, tmp_path: Path) -> None:
    m = described(folder)
    images = m._input
    assert isinstance(images, ImageInput)
    split = images.split
    assert sorted([*split.train.tolist(), *split.held_out.tolist()]) == list(range(60))
    assert torch.bincount(images.labels.indices[split.held_out]).tolist() == [4, 4, 4]
    m.train(epochs=2, **QUIET)
    files = image_folder(folder).files
    for number, file in enumerate(files):
        spoiled = number in split.held_out.tolist()
        copy = tmp_path / file.parent.name / file.name
        write_picture(copy, "dot" if spoiled else file.parent.name, seed=int(file.stem) * 7 + len(file.parent.name))
    other = described(tmp_path)
    other.train(epochs=2, **QUIET)
    assert same(state(m.module), state(other.module))
    assert other.evaluate()["loss"] != m.evaluate()["loss"]


def test_the_seed_and_the_names_of_layers_decide_the_initial_weights(folder: Path) -> None:
    torch.manual_seed(1)
    first = described(folder)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3)), "the global stream is left alone"
    assert same(state(first.module), state(described(folder, num_partitions=4).module))
    assert not same(state(first.module), state(described(folder, seed=1).module))
    twice = Model()
    images = twice.image_input(folder, rows=6, cols=5)
    left, right = (twice.relu_layer(images, 4) for _ in range(2))
    assert (left.name, right.name) == ("relu_layer", "relu_layer_2")
    assert not same(state(left.module), state(right.module))


def test_training_again_goes_on(folder: Path) -> None:
    m = described(folder)
    losses = [m.train(epochs=3, **QUIET).evaluation["loss"] for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    steps = described(folder).train(steps=5, **QUIET).steps
    assert steps == 5


def test_partitions_train_as_one_piece_does(folder: Path, tmp_path: Path) -> None:
    losses, states = [], []
    for partitions in (1, 4):
        m = Model(num_partitions=partitions)
        images = m.image_input(folder, rows=6, cols=5)
        seen = m.max_pool(m.convolution(images, 64))
        m.softmax(m.relu_layer(m.relu_layer(seen, 96), 65), num_classes=3, labels=images.labels)
        run = tmp_path / str(partitions)
        losses.append(m.train(epochs=2, compile="eager", progress=False, run_dir=run).evaluation["loss"])
        states.append(state(m.module))
        names = load_file(next(run.rglob("variables.safetensors")))
        divided = {name.partition("[")[0] for name in names if "[" in name and "/" not in name}
        assert divided == (set() if partitions == 1 else {f"{x}.{p}" for x in WIDE for p in ("weight", "bias")})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    with pytest.raises(SettingError, match="partitions was 4"):
        m.train(epochs=3, compile="eager", progress=False, run_dir=run, resume=True, partitions=2)


WIDE = ("convolution.convolution", "relu_layer.linear", "relu_layer_2.linear")


def test_the_number_of_partitions_is_kept_with_the_run(folder: Path, tmp_path: Path) -> None:
    m = described(folder, num_partitions=4)
    m.train(epochs=1, compile="eager", progress=False, run_dir=tmp_path / "run", config={"by": "test"})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["by"] == "test"
    assert config["model"] == m.description
    assert m.description["num_partitions"] == 4
    assert m.description["classes"] == list(CLASSES)
    assert repr(m).splitlines() == [
        "Model(num_partitions=4)",
        "  images           1 x 6 x 5",
        "  relu_layer       12             372 parameters",
        "  softmax          3              39 parameters",
    ]


def test_the_module_can_be_traced_saved_and_exported(folder: Path, tmp_path: Path) -> None:
    m = described(folder)
    batch = (torch.rand(2, 1, 6, 5), torch.tensor([0, 2]))
    graph = training_graph(m.module, cross_entropy, torch.optim.SGD(m.module.parameters(), lr=0.1), batch)
    assert {"relu_layer.linear.weight", "softmax.linear.bias"} <= {v.name for v in graph.variables}
    assert {"relu_layer.relu", "softmax.linear"} <= {info(node).scope for node in graph.nodes}

    save_weights(m.module, tmp_path / "weights.safetensors")
    other = described(folder, seed=5)
    load_weights(other.module, tmp_path / "weights.safetensors")
    assert same(state(m.module), state(other.module))

    exported = torch.export.export(m.module.eval(), (batch[0],)).module()
    assert torch.allclose(exported(batch[0]), m.module(batch[0]))


@pytest.mark.filterwarnings("ignore:Using padding")  # an even size is padded on one side more
@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 5), channels=st.integers(1, 4), pool=st.integers(1, 3), units=st.integers(1, 9), data=st.data()
)
def test_shapes_are_those_that_the_module_gives(
    folder: Path, size: int, channels: int, pool: int, units: int, data: st.DataObject
) -> None:
    m = Model()
    images = m.image_input(folder, rows=6, cols=5, channels=data.draw(st.sampled_from([1, 3])))
    layer: Layer = images
    for build in data.draw(
        st.permutations(
            [
                lambda x: m.convolution(x, channels, size),
                lambda x: m.max_pool(x, pool),
                lambda x: m.dropout(x, 0.3),
                lambda x: m.layer(x, nn.BatchNorm2d(x.shape[0])),
            ]
        )
    ):
        layer = build(layer)
    flat = m.linear(m.dropout(layer, 0.5), units)
    m.softmax(flat, labels=images.labels)
    inputs = torch.rand(2, *images.shape)
    for part in m._used()[1:]:
        inputs = part.module.eval()(inputs)
        assert tuple(inputs.shape) == (2, *part.shape)
    assert sum(p.numel() for p in m.module.parameters()) == sum(part.parameters for part in m._used())


def test_a_convolutional_model_with_dropout_and_a_module_of_ones_own_trains(folder: Path) -> None:
    m = Model()
    images = m.image_input(folder, rows=6, cols=5)
    seen = m.max_pool(m.convolution(images, 8))
    normed = m.layer(seen, nn.BatchNorm2d(8), name="norm")
    m.relu_layer(seen, 7, name="unused")
    m.softmax(m.dropout(m.relu_layer(normed, 16), 0.2), labels=images.labels)
    assert list(dict(m.module.named_children())) == [
        "convolution",
        "max_pool",
        "norm",
        "relu_layer",
        "dropout",
        "softmax",
    ]
    assert "unused" not in repr(m)
    assert m.train(epochs=25, batch_size=16, optimizer=adam(5e-3), **QUIET).evaluation["accuracy"] >= 0.9
    assert m.evaluate() == m.evaluate(), "dropout is off"


def test_another_folder_is_evaluated_by_the_names_of_its_labels(folder: Path, tmp_path: Path) -> None:
    m = described(folder)
    m.train(epochs=40, optimizer=adam(1e-2), **QUIET)
    for label in ("dot", "edge"):  # 0 and 1 here, 1 and 2 in the model
        for number in range(6):
            write_picture(tmp_path / label / f"{number}.png", label, seed=1000 + number)
    assert m.evaluate(tmp_path)["accuracy"] == 1.0
    (tmp_path / "edge").rename(tmp_path / "cross")
    with pytest.raises(DataError, match=r"labels 'cross' are not among the model's: bar, dot, edge"):
        m.evaluate(tmp_path)


def test_nothing_held_out(folder: Path) -> None:
    m = Model()
    images = m.image_input(folder, held_out=0)
    m.softmax(images, labels=images.labels)
    result = m.train(epochs=1, batch_size=60, **QUIET)
    assert (result.steps, dict(result.evaluation)) == (1, {})
    with pytest.raises(DataError, match=r"held_out=0.*Pass a directory"):
        m.evaluate()
    assert m.evaluate(folder)["accuracy"] >= 0


MISTAKES: dict[str, tuple[Callable[[Model, ImageInput], object], str]] = {
    "a folder in the place of a layer": (lambda m, _: m.relu_layer("pictures", 5), "got str.*m.image_input"),  # type: ignore[arg-type]
    "no layer": (lambda m, _: m.convolution(None, 5), "convolution stands on a layer.*got NoneType"),  # type: ignore[arg-type]
    "a second input": (lambda m, i: m.image_input(i.directory), "already has the input 'images'"),
    "no labels": (lambda m, i: m.softmax(i, num_classes=3), "given none: labels=images.labels"),
    "labels of something else": (lambda m, i: m.softmax(i, 3, labels=[0, 1, 2]), "given something else"),  # type: ignore[arg-type]
    "too many classes": (
        lambda m, i: m.softmax(i, 10, i.labels),
        r"num_classes=10, but .* 3 labels \(bar, dot, edge\)",
    ),
    "two outputs": (lambda m, i: [m.softmax(i, 3, i.labels) for _ in range(2)], "already has the output 'softmax'"),
    "no units": (lambda m, i: m.relu_layer(i, 0), "relu_layer: units=0"),
    "half a unit": (lambda m, i: m.linear(i, 2.5), "linear: units=2.5: expected a whole number"),  # type: ignore[arg-type]
    "all dropped": (lambda m, i: m.dropout(i, 1.0), "probability=1.0"),
    "a convolution of numbers": (
        lambda m, i: m.convolution(m.linear(i, 4), 2),
        r"needs an image.*'linear' gives \[4\]",
    ),
    "too large a pool": (lambda m, i: m.max_pool(i, 9), r"max_pool does not fit on 'images'.*\[1, 6, 5\]"),
    "a module that does not fit": (lambda m, i: m.layer(i, nn.Linear(7, 2)), "linear does not fit on 'images'"),
    "a module of two results": (lambda m, i: m.layer(m.linear(i, 4), nn.LSTM(4, 2)), "module gives tuple"),
    "a name twice": (lambda m, i: [m.linear(i, 4, name="a") for _ in range(2)], "already has a layer of this name"),
    "a name with a dot": (lambda m, i: m.linear(i, 4, name="a.b"), "expected a word"),
    "a name that a module has": (lambda m, i: m.linear(i, 4, name="forward"), "expected a word"),
    "training without an output": (lambda m, _: m.train(), "no output yet: end it with m.softmax"),
    "predicting without an output": (lambda m, _: m.predict("x.png"), "no output yet"),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_in_a_description_are_explained(
    folder: Path, mistake: Callable[[Model, ImageInput], object], message: str
) -> None:
    m = Model()
    images = m.image_input(folder, rows=6, cols=5)
    with pytest.raises(SettingError, match=message):
        mistake(m, images)


def test_layers_of_another_model_are_refused(folder: Path) -> None:
    one, other = Model(), Model()
    one.image_input(folder)
    with pytest.raises(SettingError, match="'images' is of another model"):
        one.relu_layer(other.image_input(folder), 4)


@pytest.mark.parametrize("partitions", [0, -1, 1.5, True, "4"])
def test_partitions_are_counted_in_whole_numbers(partitions: Any) -> None:
    with pytest.raises(SettingError, match="num_partitions"):
        Model(num_partitions=partitions)


def test_wrong_settings_of_the_training_are_explained(folder: Path) -> None:
    m = described(folder)
    before = state(m.module)
    with pytest.raises(SettingError, match=r"epoch_count.*Did you mean 'epochs'"):
        m.train(epoch_count=3)
    with pytest.raises(SettingError, match="epochs=0"):
        m.train(epochs=0)
    assert same(before, state(m.module))


def test_bad_folders_are_refused_at_the_input(folder: Path, tmp_path: Path) -> None:
    m = Model()
    with pytest.raises(DataError, match="does not exist"):
        m.image_input(tmp_path / "nowhere")
    with pytest.raises(DataError, match="rows=6, cols=None"):
        m.image_input(folder, rows=6)
    write_picture(tmp_path / "dot" / "0.png", "dot", seed=0)
    with pytest.raises(DataError, match="one label 'dot'"):
        m.image_input(tmp_path)
    (tmp_path / "bar").mkdir()
    (tmp_path / "bar" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        m.image_input(tmp_path)
    with pytest.raises(DataError, match=r"fraction=1\.5"):
        m.image_input(folder, held_out=1.5)
    images = m.image_input(folder)  # a refused input leaves the place free
    m.softmax(images, labels=images.labels)
    with pytest.raises(DataError, match="no image file"):
        m.predict([tmp_path / "missing.png"])
