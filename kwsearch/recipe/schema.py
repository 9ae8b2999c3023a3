"""What a recipe may say: one frozen model per section. The JSON Schema comes from here."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from kwlayers.methods import NAMES
from kwsearch.recipe.fields import (
    DISTINCT,
    UNIQUE,
    WHOLE,
    AnyBudget,
    AtLeast1,
    AtLeast4,
    AutoOrAtLeast1,
    Bool,
    CellRatio,
    Count,
    Json,
    Memory,
    Name,
    NotNegative,
    NotNegativeFloat,
    Patterns,
    Portion,
    Positive,
    Ratio,
    Scalar,
    Sharing,
    SharingRule,
    Size,
    Text,
)
from kwsearch.recipe.methods import OWN, OfMethod, group_section, method_section
from kwsearch.recipe.micronas import MODEL, MicroNAS, Supernet
from kwsearch.recipe.sections import Section, section_error
from kwsearch.recipe.tree import Origin

if TYPE_CHECKING:
    from torch import nn

    from kwlayers.plan import Plan

DIALECT = "https://json-schema.org/draft/2020-12/schema"


# Pydantic takes true for a literal 1.
_NOT_TRUE = BeforeValidator(lambda value: "true" if value is True else value)


class ModelChoice(Section):
    """The network: a name, or a name and what its factory needs."""

    name: Text = Field(
        description="name of the network, e.g. resnet50, timm:NAME, torchvision:NAME or your own "
        "package.module:function"
    )
    num_classes: AtLeast1 | None = Field(
        default=None, description="outputs; null is the network's own"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        mapping = handler.resolve_ref_schema(handler(core_schema))
        name = {"type": "string", "minLength": 1}
        return {"anyOf": [name, mapping], "description": mapping.pop("description")}


class MethodRule(Section):
    """An exception from the sharing, for the layers that match. Later rules go first."""

    layers: Patterns = Field(description="glob patterns over layer names")
    static: Bool = Field(default=False, description="the layers stay static")
    dynamic: Bool = Field(
        default=False,
        description="each of the layers becomes dynamic by itself, also if static by default",
    )
    share: Name | None = Field(
        default=None,
        description="the warehouse that the layers share, also if they are static by default; "
        "null keeps theirs, which get the settings below",
    )
    ratio: Positive | None = Field(default=None, description="cells per mixture")
    cell_ratio: CellRatio | None = Field(
        default=None, description="(out, in) channels of a cell, as parts of the common divisor"
    )
    reduction: Portion | None = Field(default=None, description="attention width")
    basis_ratio: Portion | None = Field(default=None, description="nonlocal basis")
    spatial_partition: Bool | None = Field(default=None, description="cut into 1x1 cells")


class Method(Section):
    """How layers become dynamic: the settings that planning starts from."""

    name: Literal["kernel_warehouse"] = Field(default="kernel_warehouse", description="the method")
    cell_ratio: CellRatio = Field(
        default=(1.0, 1.0),
        description="(out, in) channels of a cell, as parts of the kernels' common divisor; "
        "one number means both",
    )
    sharing: Sharing = Field(
        default="stage",
        description="layers that share a warehouse: those of a stage, of a position in their "
        "block, each layer alone, or named lists of glob patterns over layer names",
    )
    reduction: Portion = Field(
        default=0.0625, description="attention width as a part of the channels"
    )
    basis_ratio: Portion = Field(
        default=1.0,
        description="nonlocal basis as a part of the other layers' cells; 1 is no basis",
    )
    spatial_partition: Bool = Field(default=True, description="cut kernels into 1x1 cells")
    norm: Literal["auto", "batch", "layer"] = Field(
        default="auto", description="normalisation in the attention; auto follows the network"
    )
    rules: tuple[MethodRule, ...] = Field(
        default=(),
        description="exceptions from the sharing, in order: layers that stay static, that share "
        "a warehouse of their own, or whose warehouses have other settings",
    )


@functools.cache
def _other_method(name: str) -> type[BaseModel]:
    return method_section(name, Section, MethodRule)


AnyMethod = Annotated[Any, OfMethod("name", Method, _other_method)]


def section_of(method: str) -> BaseModel:
    """The section of a method as published."""
    kind = Method if method == Method().name else _other_method(method)
    return kind.model_validate({"name": method})


class Budget(Section):
    """What the network may spend: exactly one of the three."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [key], "properties": {key: {"not": {"type": "null"}}}}
                for key in ("ratio", "params", "total_ratio")
            ]
        }
    )

    ratio: Ratio | None = Field(
        default=None, description="cells per mixture: the paper's convolutional budget b"
    )
    params: Count | None = Field(
        default=None, description="parameters of the whole network, e.g. 12.8M"
    )
    total_ratio: Ratio | None = Field(
        default=None,
        validate_default=True,
        description="parameters as a multiple of the static network's, e.g. 0.5x",
    )

    @field_validator("total_ratio")
    @classmethod
    def _exactly_one(cls, value: float | None, info: ValidationInfo) -> float | None:
        # A field that failed is not in info.data; it was given all the same.
        given = [key for key in ("ratio", "params") if info.data.get(key, 0) is not None]
        given += ["total_ratio"] if value is not None else []
        if len(given) != 1:
            raise section_error(
                f"not one target (got {' and '.join(given) or 'none'}; "
                "allowed exactly one of ratio, params, total_ratio, e.g. ratio: 0.5)"
            )
        return value


class RecipeGroup(Section):
    """The layers of one warehouse, with every integer resolved."""

    method: Literal["kernel_warehouse"] = Field(
        default="kernel_warehouse", description="the method"
    )
    name: Name = Field(description="name of the warehouse: letters, digits, underscores")
    cell: Annotated[tuple[AtLeast1, ...], Field(min_length=3, max_length=5)] = Field(
        description="shape of a cell: out, in, then the kernel's sizes, e.g. [32, 32, 1, 1]"
    )
    num_cells: AtLeast1 = Field(description="cells in the warehouse")
    ratio: Positive | None = Field(
        default=None, description="the convolutional budget b, where one was given"
    )
    reduction: Portion = Field(
        default=0.0625, description="attention width as a part of the channels"
    )
    basis_ratio: Portion = Field(
        default=1.0,
        description="nonlocal basis as a part of the other layers' cells; 1 is no basis",
    )
    norm: Literal["batch", "layer"] = Field(
        default="batch", description="normalisation in the attention"
    )
    layers: Patterns = Field(description="names of its layers, or glob patterns over names")


@functools.cache
def _other_group(name: str) -> type[BaseModel]:
    return group_section(name, Section)


AnyGroup = Annotated[Any, OfMethod("method", RecipeGroup, _other_group)]


class RecipePlan(Section):
    """The resolved plan. Layers in no group stay as they are."""

    groups: tuple[AnyGroup, ...] = Field(
        description="the warehouses, or what else becomes dynamic together"
    )

    @field_validator("groups")
    @classmethod
    def _own_names(cls, groups: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [group.name for group in groups]
        error = PydanticCustomError("taken", "the name of another group")
        taken = [
            InitErrorDetails(type=error, loc=(i, "name"), input=name)
            for i, name in enumerate(names)
            if name in names[:i]
        ]
        if taken:
            raise ValidationError.from_exception_data("groups", taken)
        return groups


MethodName = Literal[NAMES]  # type: ignore[valid-type]


class Limits(Section):
    """What no plan of the search may exceed, besides the budget."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"required": ["latency_ms"], "properties": {"latency_ms": {"type": "number"}}},
            "then": {"required": ["lut"], "properties": {"lut": {"type": "string"}}},
        }
    )

    macs: Count | None = Field(default=None, description="MACs of one image, e.g. 1.8G")
    train_memory: Memory | None = Field(
        default=None,
        description="peak bytes of a training step at the proxy's batch size, counted before a "
        "plan is trained, e.g. 500MB or 12GB",
    )
    latency_ms: Positive | None = Field(
        default=None,
        description="milliseconds of a forward pass by `lut`, the upper end of the interval; of "
        "micronas the sum over operators, some of which may be fitted",
    )
    lut: Text | None = Field(
        default=None,
        validate_default=True,
        description="a latency table of `kwsearch profile`, e.g. device.lut.yaml",
    )
    peak_memory: Memory | None = Field(
        default=None,
        description="bytes of the activations of a network in int8 at their peak, of micronas, "
        "e.g. 32KB",
    )
    flash: Memory | None = Field(
        default=None,
        description="bytes of the weights and biases of a network in int8, of micronas, e.g. 512KB",
    )
    latency_batch: AtLeast1 = Field(default=1, description="images of that forward pass")
    lut_force: Bool = Field(
        default=False, description="take a table of another device or torch version as it is"
    )

    @field_validator("lut")
    @classmethod
    def _has_table(cls, lut: str | None, info: ValidationInfo) -> str | None:
        if lut is None and info.data.get("latency_ms") is not None:
            raise section_error("latency_ms needs lut, a table that `kwsearch profile` writes")
        return lut


class Space(Section):
    """What the search may vary. An empty list keeps the method's value."""

    split: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=1)] = Field(
        default=2.0,
        description="how far a warehouse's ratio may be from the common one, as a factor "
        "either way; 1 is the same everywhere",
    )
    tolerance: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, lt=1)] = Field(
        default=0.01,
        description="how far below the budget a plan's parameters may be, as a part of it",
    )
    cell_ratio: Annotated[tuple[CellRatio, ...], UNIQUE, DISTINCT] = Field(
        default=(), description="cell ratios to try"
    )
    sharing: Annotated[tuple[SharingRule, ...], UNIQUE, DISTINCT] = Field(
        default=(), description="sharing rules to try"
    )
    sharing_by_stage: Bool = Field(
        default=False, description="choose among the sharing rules for each stage on its own"
    )
    reduction: Annotated[tuple[Portion, ...], UNIQUE, DISTINCT] = Field(
        default=(), description="reductions to try"
    )
    basis_ratio: Annotated[tuple[Portion, ...], UNIQUE, DISTINCT] = Field(
        default=(), description="basis ratios to try"
    )
    spatial_partition: Annotated[tuple[Bool, ...], UNIQUE, DISTINCT] = Field(
        default=(), description="ways to cut kernels to try: into 1x1 cells (true) or not"
    )
    method: Annotated[tuple[MethodName, ...], UNIQUE, DISTINCT] = Field(
        default=(),
        description="methods to try, by their published settings; the recipe's own by its own",
    )
    methods: dict[MethodName, dict[Name, Annotated[tuple[Scalar, ...], Field(min_length=1)]]] = (
        Field(
            default_factory=dict,
            description="settings of single methods to try, as lists, e.g. "
            "{odconv: {reduction: [0.0625, 0.125]}}",
        )
    )
    keep_static: Annotated[tuple[tuple[Text, ...], ...], UNIQUE, DISTINCT] = Field(
        default=(),
        description="layers to try as static: lists of glob patterns over layer names; none "
        "is always tried",
    )
    temperature_epochs: Annotated[tuple[NotNegative, ...], UNIQUE, DISTINCT] = Field(
        default=(), description="epochs of falling temperature to try, besides the proxy's"
    )
    limits: Limits = Field(default=Limits(), description="what no plan may exceed")


class RungStop(Section):
    """Where trials stop: after so many epochs on these images. The last is the full trial."""

    epochs: AtLeast1 = Field(description="epochs; on other images than the rung before, anew")
    subset: AtLeast1 | None = Field(default=None, description="examples; null is the proxy's")
    resolution: AtLeast4 | None = Field(
        default=None, description="side of the images; null is the proxy's"
    )


class Resources(Section):
    """What a cluster keeps for each trial; fractions are parts of one."""

    cpus: NotNegativeFloat | None = Field(
        default=None, description="CPUs; null is proxy.threads, or 1 without them"
    )
    gpus: NotNegativeFloat | None = Field(
        default=None, description="GPUs; null is 1 if proxy.device is cuda, else 0"
    )


class Search(Section):
    """How to look for a better plan."""

    trials: AtLeast1 = Field(default=40, description="trials to run, over all budgets")
    budgets: Annotated[tuple[AnyBudget, ...], UNIQUE, DISTINCT] = Field(
        default=(),
        description="a sweep: budgets to search under in one study, each in place of the value "
        "under budget, e.g. [0.25, 0.5, 1, 2]",
    )
    timeout: Positive | None = Field(
        default=None, description="seconds after which no trial starts"
    )
    seed: Annotated[int, Field(strict=True, ge=0, le=2**32 - 1), WHOLE] = Field(
        default=0, description="seed of the sampler"
    )
    strategy: Literal["sampler", "differentiable"] = Field(
        default="sampler",
        description="where trials come from: the sampler, or each from a supernet of its own that "
        "is trained with its choices, of micronas",
    )
    supernet: Supernet = Field(default=Supernet(), description="of strategy differentiable")
    sampler: Literal["tpe", "gp", "nsgaii", "random"] = Field(
        default="tpe", description="how trials are proposed"
    )
    startup: NotNegative = Field(
        default=8, description="trials spread evenly over the space before the sampler takes over"
    )
    pruner: Literal["halving", "median", "none"] = Field(
        default="halving",
        description="how hopeless trials are stopped: at rungs, from which the best go on; or "
        "for good, below the median of the others",
    )
    eta: Annotated[int, Field(strict=True, ge=2), WHOLE] = Field(
        default=3, description="1/eta of the trials at a rung go on"
    )
    rungs: tuple[RungStop, ...] = Field(
        default=(),
        description="where trials stop, in order; empty is the proxy's epochs divided by eta, "
        "and again while the temperature is at 0",
    )
    calibration: NotNegative = Field(
        default=6, description="first trials that are never stopped: they show how rungs rank"
    )
    rung_tau: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1, le=1)] = Field(
        default=0.3,
        description="Kendall's tau to the full length from which on a rung may stop trials",
    )
    zero_cost: Literal["grad_norm", "synflow", "jacob_cov"] | None = Field(
        default=None,
        description="a score of the untrained network as the first rung; null is none",
    )
    repeat: Bool = Field(
        default=False,
        description="train a plan that is proposed again once more, with another seed; else a "
        "neighbour of it is trained",
    )
    finalists: NotNegative = Field(
        default=3,
        description="best plans that are trained again, as the baselines are, for the verdict; 0 "
        "is no verdict",
    )
    seeds: AtLeast1 = Field(default=3, description="trainings of each finalist, by seed")
    workers: AutoOrAtLeast1 = Field(
        default=1,
        description="trials at a time, each its own process; auto is as many as the cores have "
        "proxy.threads for, or as the GPUs have memory for, or a cluster has resources for, or "
        "as there are workers",
    )
    executor: Literal["local", "ray", "queue"] = Field(
        default="local",
        description="who runs trials: processes of this machine, a Ray cluster, or workers that "
        "take them from the study's database",
    )
    resources: Resources = Field(
        default=Resources(), description="what a cluster keeps for each trial"
    )
    checkpoints: Text | None = Field(
        default=None,
        description="where trials keep their state, for all machines to see: a folder, or a URL of "
        "object storage, e.g. s3://bucket/runs; null is the run directory",
    )
    deterministic: Bool = Field(
        default=False,
        description="the same trials whatever the number of workers: asked for in generations of "
        "8, rungs decided when a generation has arrived",
    )
    space: Space = Field(default=Space(), description="what the search may vary")


def _fits_epochs(value: int, info: ValidationInfo) -> int:
    epochs = info.data.get("epochs", value)
    if value > epochs:
        raise ValueError(
            f"more than there are epochs (got {value}; allowed 0 to {epochs}, all the epochs)"
        )
    return value


class Tap(Section):
    """A part of a network that learns through its classifier (SR-CTC, a reconstruction)."""

    weight: NotNegativeFloat = Field(default=1.0, description="its CTC in the loss, at first")
    final_weight: NotNegativeFloat | None = Field(
        default=None,
        description="in the last epoch, to which it changes linearly; null is the same",
    )
    distillation: NotNegativeFloat = Field(
        default=0.0, description="what it learns from the network's own logits"
    )


class Proxy(Section):
    """The short training that scores a trial."""

    data: Text = Field(default="digits", description="name of a data set, a path, or a URL")
    resolution: AtLeast4 | None = Field(
        default=None, description="side of the images; null is the recipe's input"
    )
    fold: AtLeast1 | None = Field(
        default=None, description="of sound in folds, which one is the test part; null is the first"
    )
    epochs: AtLeast1 = Field(default=5, description="epochs of a full trial")
    subset: AtLeast1 | None = Field(default=None, description="examples to use; null is all")
    holdout: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, lt=1)] = Field(
        default=0.2, description="part of the examples kept for scoring"
    )
    batch_size: AtLeast1 = Field(default=64, description="examples per step")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="the optimizer")
    lr: Positive = Field(default=0.1, description="peak learning rate")
    momentum: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1)] = Field(
        default=0.9, description="momentum of sgd"
    )
    weight_decay: NotNegativeFloat = Field(default=0.0005, description="weight decay")
    temperature_epochs: Annotated[NotNegative, AfterValidator(_fits_epochs)] = Field(
        default=1, validate_default=True, description="epochs over which the temperature falls to 0"
    )
    augment: Literal["none", "shift", "flip"] = Field(default="none", description="augmentation")
    mixup: Positive | None = Field(
        default=None,
        description="mixes pairs of examples and their labels by shares of Beta(mixup, mixup), "
        "e.g. 0.3 as DyMN was trained; null is none",
    )
    threads: AtLeast1 | None = Field(
        default=None, description="CPU threads per trial; null is torch's own"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to train")
    init: Literal["scratch", "static", "warm_start"] = Field(
        default="scratch",
        description="what plans start from: cells and attention as published; static: what the "
        "untrained static network computes; warm_start: the static network, trained once per "
        "study. With the last two the temperature is 0",
    )
    init_epochs: AtLeast1 | None = Field(
        default=None,
        description="epochs of the static network of warm_start; null is those of a full trial",
    )
    taps: dict[Name, Tap] = Field(
        default={"conv1d": Tap()},
        description="parts of a network for sign language that learn through its classifier while "
        "it is trained, e.g. {conv1d: {distillation: 10}, layer4: {weight: 0.5, final_weight: 0}}",
    )
    teacher: Text | None = Field(
        default=None,
        description="a .npz of names and logits of the training examples, to distil from",
    )
    teacher_weight: Portion = Field(default=0.9, description="of the teacher in the loss")

    @property
    def starts_static(self) -> bool:
        """Whether plans start as the static network, at temperature 0."""
        return self.init != "scratch"


class Training(Section):
    """Hints for the training code that uses the recipe."""

    epochs: AtLeast1 = Field(default=300, description="epochs")
    temperature_epochs: Annotated[NotNegative, AfterValidator(_fits_epochs)] | None = Field(
        default=None, description="epochs over which the temperature falls to 0"
    )
    batch_size: AtLeast1 | None = Field(
        default=None, description="examples per step, over all devices"
    )
    optimizer: Text | None = Field(default=None, description="name of the optimizer")
    lr: Positive | None = Field(default=None, description="peak learning rate")
    weight_decay: NotNegativeFloat | None = Field(default=None, description="weight decay")
    note: str | None = Field(default=None, description="anything else, for people")


_GIVEN: dict[str, Any] = {"not": {"type": "null"}}
# Methods that have sizes without a budget.
_OF_OTHERS: dict[str, Any] = {"required": ["name"], "properties": {"name": {"not": {"const": OWN}}}}
_NAMED: dict[str, Any] = {"name": {"const": MODEL}}
_MICRONAS: dict[str, Any] = {
    "anyOf": [
        {"const": MODEL},
        {"allOf": [{"type": "object"}, {"required": ["name"], "properties": _NAMED}]},
    ]
}


class Recipe(Section):
    """A recipe: a network, a budget or a resolved plan, and how to search and train it.

    Of a method with published sizes it needs neither. Of micronas without either it is about
    architectures: one, or the search for one.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["budget"], "properties": {"budget": _GIVEN}},
                {"required": ["plan"], "properties": {"plan": _GIVEN}},
                {"required": ["method"], "properties": {"method": _OF_OTHERS}},
                {"required": ["model"], "properties": {"model": _MICRONAS}},
            ]
        }
    )

    format: Annotated[Literal[1], WHOLE, _NOT_TRUE] = Field(
        description="version of the recipe format"
    )
    model: ModelChoice = Field(description="the network: a name, or {name, num_classes}")
    input: Size | None = Field(
        default=None,
        description="one input: channels and sizes, e.g. [3, 224, 224] or 3x224x224, 1x16000 for "
        "sound, 3x16x112x112 for videos",
    )
    method: AnyMethod = Field(default=Method(), description="how layers become dynamic")
    budget: Budget | None = Field(default=None, description="what the network may spend")
    plan: RecipePlan | None = Field(
        default=None, validate_default=True, description="the resolved plan"
    )
    micronas: MicroNAS | None = Field(
        default=None,
        validate_default=True,
        description="of the model micronas: what its architectures are made of, or one of them",
    )
    search: Search | None = Field(default=None, description="how to look for a better plan")
    proxy: Proxy | None = Field(default=None, description="the short training that scores a trial")
    training: Training | None = Field(default=None, description="hints for your own training code")
    provenance: dict[str, Json] = Field(
        default_factory=dict, description="where the recipe comes from: free keys and values"
    )
    _origin: Origin = PrivateAttr(default=Origin())

    @field_validator("plan")
    @classmethod
    def _budget_or_plan(cls, plan: RecipePlan | None, info: ValidationInfo) -> RecipePlan | None:
        sized = getattr(info.data.get("method"), "name", OWN) != OWN
        named = getattr(info.data.get("model"), "name", "") == MODEL
        if plan is None and info.data.get("budget", 0) is None and not sized and not named:
            raise section_error(
                "no budget and no plan (allowed either or both, e.g. budget: {ratio: 0.5})"
            )
        return plan

    @field_validator("micronas")
    @classmethod
    def _of_micronas(cls, micronas: MicroNAS | None, info: ValidationInfo) -> MicroNAS | None:
        if micronas is None:
            return None
        name = getattr(info.data.get("model"), "name", MODEL)
        if name != MODEL:
            raise section_error(f"micronas is of the model {MODEL}, not of {name}: leave it out")
        for other in ("budget", "plan"):
            if info.data.get(other) is not None:
                raise section_error(
                    f"micronas and {other}: a {other} is of warehouses in one network, micronas of "
                    "architectures: leave one of them out"
                )
        return micronas

    @property
    def of_architectures(self) -> bool:
        """Whether it is about architectures, and not about plans of one network."""
        sized = self.method.name != OWN
        none = self.budget is None and self.plan is None
        return self.model.name == MODEL and none and not sized

    def place(self, *path: str | int) -> str:
        """`file:line:column` of the value at `path`; "" if the recipe was not read from text."""
        return self._origin.place(*path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML: what was set, in the order of the schema."""
        data: dict[str, Any] = _plain(self)
        return data

    def create_model(self, trust: bool = False) -> nn.Module:
        """The recipe's static model, freshly initialised, on torch's default device.

        trust: allows it to import and call the function of your own that the recipe names.
        """
        from kwsearch.resolve import create_model

        return create_model(self, trust=trust)

    def plan_for(self, model: nn.Module) -> Plan:
        """The plan for `model`, which may be your own: its layers are found by name.

        The recipe's plan as it stands, else the one that meets its budget. Raises
        kwlayers.PlanError if the model has other layers.
        """
        from kwsearch.resolve import plan_for

        return plan_for(self, model)


def _plain(value: Any) -> Any:
    if isinstance(value, ModelChoice) and value.num_classes is None:
        return value.name
    if isinstance(value, BaseModel):
        data = {}
        for key, field in type(value).model_fields.items():
            item = getattr(value, key)
            default = field.get_default(call_default_factory=True)
            says_nothing = item is None or item == {}
            if item != default or (key in value.model_fields_set and not says_nothing):
                data[key] = copy.deepcopy(item) if key == "provenance" else _plain(item)
        return data
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file (draft 2020-12), for editors and other checkers."""
    return {"$schema": DIALECT, **Recipe.model_json_schema(), "title": "kwsearch recipe"}
