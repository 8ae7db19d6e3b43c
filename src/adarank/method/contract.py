"""The one contract of everything that can stand under `merge_method`.

A method is a frozen object of settings. It says what it reads, what it holds and what it writes before anything is
read, and it runs:

    method = kind.resolve(given)            its settings, from a recipe or from Python
    method.check(network)                   refuses a network, from headers alone
    method.held_bytes(outline)              for the memory plan
    method.output_layouts(outline)          the tensors that it will write
    result = method.run(context)            what is to be written, and what the record says of it

`recipe/registry.py` knows all methods by name, those of other packages too. Nothing else tells kinds of methods apart:
workflow, plan, catalogue, search, the Python API and the command line ask the method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from adarank.alignment.task_vectors import AlignedCheckpoints
from adarank.data.labels import OF_CLASSIFIERS, Problem
from adarank.io.bundle import PartFile
from adarank.io.writer import Layout, layout_bytes
from adarank.method.context import Context, Result
from adarank.method.outline import Another, Given, Outline
from adarank.settings import Settings, parse

Self = TypeVar("Self", bound="MergeMethod")


class MergeMethod(Settings):
    """Base of everything that can stand under `merge_method`: a frozen object of settings.

    Most methods derive from one of its subclasses, which need less: `methods.base.Method` (a function of one tensor),
    `methods.task_aware.base.TaskAwareMethod` (parts of one tensor), `methods.calibrated.base.CalibratedMethod` (a function of one tensor
    and of statistics), `adapt.methods.AdaptiveMethod` (a start of the adaptation), `modular.base.Modular` (modules).

    Class attributes:
        name: what recipes call it.
        formula, source: one line each for the catalogue.
        data: what it reads of the tasks' data, in words; empty if it reads none.
        use: what it does with them, for errors: "adapts on", "takes statistics of".
        labels: the labels that it cannot do without, in words; empty if it can.
        of_classes: True if it reads what networks give as shares of classes, so that of other outputs nothing can be learned.
        of_inputs: True if it reads one prediction or one vector of each input, so that it is none for models that predict every token.
        in_use: what whoever uses the output must know of every input, a sentence; empty for one model for all.
        by_tensor: its settings may differ by tensor, so that they are parsed when the network's names are known.
        per_model: settings that each model of a recipe may carry.
        takes_steps: True if it adapts or trains, step by step.
        adapt_block: the settings that a recipe's `adapt` block holds; None if it takes no such block.
        unused: settings of that block that mean nothing here. `defaults`: values of those whose default is another here.
        fixed: settings that have but one value here; the catalogue leaves them out.
        merges_base: True if the base is merged as the models are, listed among them or not.
        keeps_embeddings: embeddings stay the base's where the family of models says so.
        not_searched: why a search cannot try it at points of a grid; empty if it can.
        python: the function of the Python API that runs it, and what an error says of it where another one was called.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    data: ClassVar[str] = ""
    use: ClassVar[str] = "reads"
    labels: ClassVar[str] = ""
    of_classes: ClassVar[bool] = False
    of_inputs: ClassVar[bool] = False
    in_use: ClassVar[str] = ""
    by_tensor: ClassVar[bool] = False
    per_model: ClassVar[tuple[str, ...]] = ()
    takes_steps: ClassVar[bool] = False
    adapt_block: ClassVar[type[Settings] | None] = None
    unused: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[Mapping[str, Any]] = {}
    fixed: ClassVar[frozenset[str]] = frozenset()
    merges_base: ClassVar[bool] = False
    keeps_embeddings: ClassVar[bool] = True
    not_searched: ClassVar[str] = ""
    python: ClassVar[tuple[str, str]] = (
        "merge",
        "gives one model for all tasks, without adapting. Use adarank.merge.",
    )

    # what the catalogue says of it

    @classmethod
    def needs(cls) -> str:
        """Models and data, and whether labels are read."""
        models = "base and experts" if cls.needs_base() else "experts"
        return f"{models}, and {cls.data}" if cls.data else f"{models}; no data"

    @classmethod
    def passes_over(cls) -> str:
        """How often checkpoints and inputs are gone through."""
        return "the checkpoints"

    @classmethod
    def memory(cls) -> str:
        """What is held at a time."""
        return "one tensor at a time"

    @classmethod
    def needs_base(cls) -> bool:
        """Whether it needs the model that the experts were fine-tuned from."""
        return True

    @classmethod
    def takes_slices(cls) -> bool:
        """Whether some layers can be merged apart from the others."""
        return False

    @classmethod
    def decomposes_kernels(cls, given: Given) -> bool | Collection[str]:
        """Which kernels of convolutions are decomposed by default: True for all where they outweigh the matrices, or names.

        Asked before models are aligned: of settings that do not fit nothing is said here.
        """
        return False

    def shares_work(self) -> bool:
        """Whether several processes that run it together share its work, and write what one alone would."""
        return False

    @classmethod
    def of_one_task(cls) -> tuple[str, ...]:
        """Settings that, given for one model, change the weights of its task alone: a search tunes them task by task."""
        return ()

    # what is said of it before anything is read

    @classmethod
    def resolve(cls: type[Self], given: Given) -> Self:
        """The method with all its settings.

        Raises:
            RecipeError: settings that do not fit; all are named.
        """
        return parse(cls, given.parameters, f"parameters of '{cls.name}'")

    def over(self: Self, given: Given) -> Self:
        """The same method where the tensors' names are known, as `given.names` has them.

        Raises:
            RecipeError: settings that do not fit them.
        """
        return self

    def check_recipe(self, tasks: Collection[str]) -> list[str]:
        """What is wrong with the settings, as far as a recipe alone tells; problems that need its files come later.

        Arguments:
            tasks: the recipe's.
        """
        return []

    def unfit_for(self, task: str, problem: Problem, outputs: int) -> list[str]:
        """What of it is for one class of an input alone, and what to do: sentences that go on from what the task's model is.

        Arguments:
            problem: what the model gives: not one class of an input.
            outputs: how many classes or numbers it gives.
        """
        if not self.of_classes and not (self.of_inputs and problem not in OF_CLASSIFIERS):
            return []
        return [
            f"'{self.name}' reads its outputs as shares of classes. Merge by a method that does not, such as adarank, cart, ties or regmean; the task is scored all the same."
        ]

    def put_on(self) -> Another | None:
        """The method that this one is put on, if there is one: its part of the recipe is checked as a recipe is."""
        return None

    def check(self, network: AlignedCheckpoints) -> None:
        """Raise a `RecipeError` if the method cannot merge this network. Called before any work."""

    def in_force(self) -> dict[str, Any]:
        """Every setting with its value, defaults included, as a record has them."""
        return {"parameters": self.model_dump(by_alias=True)}

    def of_data(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """What of the tasks' data it will read, as a plan says it. Called before anything is computed.

        Arguments:
            tasks: task -> its rows: what has `labels` and `splits`.

        Raises:
            DataError: they lack what it reads.
        """
        return {}

    def notes(self, network: AlignedCheckpoints) -> list[str]:
        """What a user may not expect of it here, in sentences."""
        return []

    @property
    def decomposes(self) -> bool:
        """False if it takes matrices as they are."""
        return False

    def action(self, chosen: str) -> str:
        """What happens to a tensor, in a plan's word, given what was chosen for it."""
        return chosen

    def held_bytes(self, outline: Outline) -> int:
        """What running it holds in memory, within the outline's budget where it can; without the activations of a network's batches."""
        return layout_bytes(outline.layout)

    def factors_in_files(self, outline: Outline) -> bool:
        """Whether the outline's budget has no room for what it decomposes, so that it is mapped from files."""
        return False

    def smaller(self, outline: Outline) -> dict[str, int]:
        """What a recipe may say instead, so that less is held -> the bytes that are held then."""
        return {}

    def output_layouts(self, outline: Outline) -> tuple[Layout, dict[str, Layout]]:
        """Layouts of the model's tensors or of a bundle's shared parts, and of each task's parts; heads apart."""
        return outline.layout, {}

    # what it does

    def run(self, context: Context) -> Result:
        """Merge, adapt or train; nothing of it is written here. What takes long is continued from `context.state`."""
        raise NotImplementedError

    # how a bundle of it is read, if it writes one

    @classmethod
    def task_tensors(cls, tensors: Layout, shared: PartFile, of_task: PartFile) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of one task's whole network but its head, in the layout's order, one in memory at a time."""
        raise NotImplementedError

    dress: ClassVar[Callable[..., nn.Module] | None] = None
    """(bundle, task, module with these tensors and the task's head) -> what serves the task, where that is more than the
    module: adapters put into it, layers that merge per input in place of plain ones."""
