"""Configs of the models: names and numbers only, no JAX."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxrec.errors import UserError
from jaxrec.registry import names

Structure = Literal["identity", "toeplitz", "full"]
Position = Literal[
    "additive", "kernel", "additive+kernel", "t5", "alibi", "rope", "relative", "none"
]


@dataclass(frozen=True)
class ModelConfig:
    """Base of every model's config."""

    type: ClassVar[str] = ""

    def check(self, *, max_length: int) -> None:
        """Raises UserError naming the first field with an impossible value.

        Args:
          max_length: of the sequences that the model will see.
        """

    @property
    def reads_timestamps(self) -> bool:
        """Whether the model wants to know when events happened."""
        return False


@dataclass(frozen=True)
class PositionalKernelConfig:
    """The learned kernel over positions of one attention block."""

    logits: Structure = "toeplitz"
    """Structure of the factor on the attention logits."""
    values: Structure = "toeplitz"
    """Structure of the factor on the values."""
    band: int | None = None
    """Toeplitz: number of taps; none for the full length."""
    per_head: bool = False
    """One kernel a head instead of one for all heads."""
    tie: bool = False
    """The value factor is the transpose of the logit factor."""
    shared: bool = False
    """All blocks share one kernel instead of each having its own."""
    init: Literal["identity", "powerlaw"] = "identity"
    """identity (position-free attention at step 0) or powerlaw."""
    power: float = 1.0
    """Exponent of the powerlaw initialisation."""


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """What the softmax-attention models have in common."""

    width: int = 64
    blocks: int = 2
    heads: int = 1
    dropout: float = 0.2
    """On the input, the attention weights and the feed-forward layers."""
    position: Position = "additive"
    """How the order of events enters: vectors at the input (additive), a learned kernel over
    positions in attention (kernel), both, a bias on the logits that is learned a bucket of
    distances (t5), learned a distance (relative) or fixed (alibi), rotation of queries and keys
    (rope), or not at all (none)."""
    position_order: Literal["oldest", "newest"] = "oldest"
    """Positions are counted from the oldest or from the newest event of the sequence."""
    kernel: PositionalKernelConfig = field(default_factory=PositionalKernelConfig)
    alibi_slope: float | None = None
    """ALiBi: slope of the last head, the others in the usual ratios; none for 1/256. With the one
    head of most recommenders 1/256 is next to no bias."""
    rope_base: float = 10_000.0
    """RoPE: the slowest pair turns once in about 2 pi times this many events."""
    scale_embedding: bool = True
    """Multiply item vectors by sqrt(width) at the input."""
    untied: bool = False
    """Score with a second table of item vectors instead of the one at the input."""
    norm_epsilon: float = 1e-8
    normalize: bool = False
    """States and item vectors are scaled to length 1 before they are multiplied, so that scores are
    cosines; the loss then needs a temperature."""
    init_scale: float | None = 0.02
    """Standard deviation of the normal initialisation; none for Xavier's of each matrix,
    sqrt(2 / (rows + columns))."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters are float32."""

    def check(self, *, max_length: int) -> None:
        check_positive(self, "width", "blocks", "heads")
        if self.width % self.heads:
            raise UserError(
                f"config: model.width ({self.width}) must be a multiple of model.heads "
                f"({self.heads})"
            )
        check_numbers(self)
        if self.position == "rope" and self.width // self.heads % 2:
            raise UserError(
                "config: model.position 'rope' needs an even width a head, got "
                f"{self.width // self.heads}"
            )
        for name in ("alibi_slope", "rope_base"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"config: model.{name} must be positive, got {value}")
        if self.kernel.band is not None and self.kernel.band < 1:
            raise UserError(f"config: model.kernel.band must be positive, got {self.kernel.band}")
        if "kernel" in self.position and (self.kernel.band or 1) > max_length:
            raise UserError(
                f"config: model.kernel.band ({self.kernel.band}) must be at most data.max_length "
                f"({max_length})"
            )
        if self.kernel.tie and self.kernel.logits != self.kernel.values:
            raise UserError(
                "config: model.kernel.tie needs equal structures, got "
                f"{self.kernel.logits} and {self.kernel.values}"
            )


def check_positive(config: ModelConfig, *fields: str) -> None:
    """Raises UserError for the first of the fields that is given and below 1."""
    for name in fields:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"config: model.{name} must be positive, got {value}")


def check_numbers(config: Any) -> None:
    """Raises UserError for an impossible norm_epsilon, init_scale or dropout."""
    if not config.norm_epsilon > 0:
        raise UserError(f"config: model.norm_epsilon must be positive, got {config.norm_epsilon}")
    if config.init_scale is not None and not config.init_scale >= 0:
        raise UserError(f"config: model.init_scale must not be negative, got {config.init_scale}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"config: model.dropout must be in [0, 1), got {config.dropout}")


def check_activation(name: str) -> None:
    if name not in names("activation"):
        raise UserError(
            f"config: unknown model.activation {name!r}; known: {', '.join(names('activation'))}"
        )


@dataclass(frozen=True)
class SASRecConfig(TransformerConfig):
    """Config of `jaxrec.models.sasrec.SASRec`."""

    type: ClassVar[str] = "sasrec"

    feed_forward: int | None = None
    """Inner width of the feed-forward layers; none for the model's width."""
    residual: Literal["normalized", "input"] = "normalized"
    """What attention is added to: the normalized query (the original) or the block's input."""
    output_projection: bool = True
    """A linear layer after attention, as the PyTorch ports have; the original has none."""
    activation: str = "relu"

    def check(self, *, max_length: int) -> None:
        super().check(max_length=max_length)
        check_positive(self, "feed_forward")
        check_activation(self.activation)


@dataclass(frozen=True)
class ESASRecConfig(TransformerConfig):
    """Config of `jaxrec.models.esasrec.ESASRec`."""

    type: ClassVar[str] = "esasrec"

    dropout: float = 0.1
    position_order: Literal["oldest", "newest"] = "newest"
    scale_embedding: bool = False
    norm_epsilon: float = 1e-5
    expansion: int = 4
    """Inner width of the gated feed-forward layers, in widths of the model."""
    activation: str = "silu"
    """Of the gated feed-forward layers."""

    def check(self, *, max_length: int) -> None:
        super().check(max_length=max_length)
        check_positive(self, "expansion")
        check_activation(self.activation)


@dataclass(frozen=True)
class HSTUConfig(ModelConfig):
    """Config of `jaxrec.models.hstu.HSTU`; the defaults are the research configuration."""

    type: ClassVar[str] = "hstu"

    width: int = 50
    blocks: int = 2
    heads: int = 1
    query_width: int | None = None
    """Width of queries and keys a head; none for width / heads."""
    value_width: int | None = None
    """Width of values and gates a head; none for width / heads."""
    dropout: float = 0.2
    """On the input and on the gated output of attention."""
    position: Literal["additive", "none"] = "additive"
    """Vectors at the input, besides the bias."""
    bias: Literal["position+time", "position", "time", "none"] = "position+time"
    """The learned bias inside attention: by distance, by time between events, both, not."""
    time_buckets: int = 128
    normalizer: int | None = None
    """N, by which attention weights are divided; none for data.max_length + 11, as published."""
    scale: Literal["one", "rsqrt"] = "one"
    """Of the products inside SiLU: 1, or 1/sqrt(query_width) as in the serving variant."""
    silu: Literal["uvqk", "u"] = "uvqk"
    """What SiLU is applied to: all four projections, or the gate alone (serving variant)."""
    projection_bias: bool = False
    """A bias on the four projections (serving variant)."""
    norm_affine: bool = False
    """Layer normalisation with a learned scale and bias (serving variant)."""
    group_norm: bool = False
    """Normalise the attention's output a head instead of over all heads (serving variant)."""
    concat: bool = False
    """Project [gate, attention, gated attention] instead of the last alone (serving variant)."""
    normalize: bool = True
    """Scores are cosines: states and item vectors have length 1 (a loss divides by its
    temperature)."""
    scale_embedding: bool = True
    """Multiply item vectors by sqrt(width) at the input."""
    untied: bool = False
    """Score with a second table of item vectors instead of the one at the input."""
    norm_epsilon: float = 1e-6
    init_scale: float | None = 0.02
    """Standard deviation of the normal initialisation; none for Xavier's of each matrix,
    sqrt(2 / (rows + columns))."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters are float32."""

    @property
    def reads_timestamps(self) -> bool:
        return "time" in self.bias

    def check(self, *, max_length: int) -> None:
        check_positive(
            self,
            "width",
            "blocks",
            "heads",
            "query_width",
            "value_width",
            "time_buckets",
            "normalizer",
        )
        if self.width % self.heads and None in (self.query_width, self.value_width):
            raise UserError(
                f"config: model.width ({self.width}) must be a multiple of model.heads "
                f"({self.heads}), unless query_width and value_width are given"
            )
        check_numbers(self)
