"""Does a model repeat its training clips?

    python experiments/nearest.py --data FOLDER --checkpoint MODEL
    python experiments/nearest.py --data shapes --videos 36 --checkpoint MODEL

For each clip the distance to the training clip that is nearest to it, a root mean square over all
pixels in levels of 0 to 255, the median over clips; and how often that one has the same caption.
"real": training clips, each among the others; "copy": what the autoencoder makes of them, as near
as a memorised clip would be; "generated": for their captions, at the frame rates of their clips, or
at one for all, which gives nothing away. FVD is that to the training clips. In the picture
generated clips stand above the training clips nearest to them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import UserError, check_output, file_name, number, pick_device, print_row, run_command

from dataclasses import replace

import numpy as np

import metrics
from data import IMAGES, VideoFolder, contact_sheet, read_ahead, write_picture
from experiments.order import drawing_parser
from experiments.reference import spoil
from sample import load_pipeline
from shapes import MovingShapes


def root_mean_square(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances between clips, uint8 (..., f, h, w, 3), that broadcast: in levels of 0 to 255."""
    return np.sqrt(np.square(a - b.astype(np.float32)).mean((-4, -3, -2, -1)))


def nearest(checkpoint: str | Path, data: str, videos: int, num: int, picture: Path) -> None:
    """Prints the rows and draws the picture that the top of this file describes."""
    check_output(picture, data)
    device = pick_device("auto")
    pipeline = load_pipeline(checkpoint, device)
    form = {"frames": pipeline.frames, "size": pipeline.size}
    if pipeline.frames < metrics.I3D_MIN_FRAMES:
        raise UserError(f"{checkpoint} draws {pipeline.frames} frames, and FVD needs "
                        f"{metrics.I3D_MIN_FRAMES}")
    if data == "shapes" and not isinstance(pipeline.size, int):
        raise UserError(f"{checkpoint} draws no squares, and the built-in clips are: name its data")
    dataset = MovingShapes(videos, **form) if data == "shapes" else VideoFolder(data, **form)
    networks, _ = metrics.load_networks(metrics.parse_args(["--fake", data]), ["fvd"], device)
    real = [clip for _, clip in read_ahead(dataset, range(len(dataset))) if clip is not None]
    clips = np.stack([sample.video for sample in real])
    chosen = real[:num]
    num = len(chosen)
    if num < 2:
        raise UserError(f"{data}: a distance between sets needs two clips or more")
    asked, rates = [s.caption for s in chosen], [s.fps for s in chosen]
    shown = {
        "real": [s.video for s in chosen],
        "copy": [spoil(s.video, "reconstructed", None, pipeline.vae) for s in chosen],
        "generated": pipeline.generate(asked, fps=rates),
        "generated, one rate": pipeline.generate(asked, fps=np.median(rates)),
    }
    whole, found = metrics.extract(real, len(real), networks, device, title="training clips"), {}
    for name, videos in shown.items():
        samples = (replace(s, video=video) for s, video in zip(chosen, videos))
        distances = np.array([root_mean_square(video, clips) for video in videos])
        if name == "real":
            side = {"i3d": whole["i3d"][:num]}
            np.fill_diagonal(distances, np.inf)
        else:
            side = metrics.extract(samples, num, networks, device, title=name)
        found[name] = distances.argmin(1)
        same = [s.caption == real[i].caption for s, i in zip(chosen, found[name])]
        print_row(clips=name, num=num, distance=np.median(distances.min(1)),
                  same_caption=np.mean(same), **metrics.compare(whole, side, ["fvd"]))
    for warning in metrics.small_sample_warnings(["fvd"], num, pipeline.frames):
        print(f"warning: {warning}", file=sys.stderr)
    frames = np.linspace(0, pipeline.frames - 1, 8).round().astype(int)
    rows = []
    for i in np.linspace(0, num - 1, min(num, 4)).round().astype(int):
        rows += [shown["generated"][i], clips[found["generated"][i]]]
    sheets = [contact_sheet(video[frames], columns=len(frames)) for video in rows]
    write_picture(picture, np.concatenate(sheets))


def parse_args(argv=None):
    """The command line."""
    parser = drawing_parser(__doc__, 36, "training clips to draw again", least=2)
    parser.add_argument("--data", required=True, metavar="shapes|FOLDER")
    parser.add_argument("--videos", type=number(int, 1, 2**20), default=1000,
                        help="that were trained on, with --data shapes (%(default)s)")
    parser.add_argument("--picture", type=file_name(*IMAGES), default="samples/nearest.png",
                        help="(%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: nearest(**vars(parse_args())))
