"""A whole model in five lines, from a folder of pictures (DistBelief's program of 2015, in today's spelling).

Usage: python examples/five_lines.py [DIRECTORY]

DIRECTORY holds one folder of pictures per label. Without it, 1,797 scans of handwritten digits are written to one.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

import millrace


def main(directory: Path) -> None:
    m = millrace.Model(num_partitions=4)
    images = m.image_input(directory, rows=8, cols=8)
    hidden = m.relu_layer(images, 2000)
    out = m.softmax(hidden, num_classes=10, labels=images.labels)
    m.train()

    print(m)
    print(f"accuracy over {out.shape[0]} classes, on pictures it never saw: {m.evaluate()['accuracy']:.1%}")
    for seen in m.predict(sorted(directory.glob("*/*.png"))[::300]):
        print(f"  {seen.file.relative_to(directory)} shows a {seen.label} ({seen.probability:.1%} sure)")


def write_digits(directory: Path) -> None:
    """Scikit-learn's scans, 8 x 8 pixels each, as directory/<digit>/<number>.png."""
    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = directory / str(digit)
        folder.mkdir(exist_ok=True)
        Image.fromarray((pixels / 16 * 255).round().astype("uint8")).save(folder / f"{number:04}.png")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            write_digits(Path(temporary))
            main(Path(temporary))
