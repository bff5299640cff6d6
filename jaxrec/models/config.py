"""Configs of the models: names and numbers only, no JAX."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxrec.errors import UserError
from jaxrec.registry import names

Structure = Literal["identity", "toeplitz", "full"]


@dataclass(frozen=True)
class ModelConfig:
    """Base of every model's config."""

    type: ClassVar[str] = ""

    def check(self, *, max_length: int) -> None:
        """Raises UserError naming the first field with an impossible value.

        Args:
          max_length: of the sequences that the model will see.
        """


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
class SASRecConfig(ModelConfig):
    """Config of `jaxrec.models.sasrec.SASRec`."""

    type: ClassVar[str] = "sasrec"

    width: int = 64
    blocks: int = 2
    heads: int = 1
    dropout: float = 0.2
    """On the input, the attention weights and the feed-forward layers."""
    feed_forward: int | None = None
    """Inner width of the feed-forward layers; none for the model's width."""
    position: Literal["additive", "kernel", "additive+kernel", "none"] = "additive"
    """How the order of events enters: vectors at the input, a kernel in attention, both, not."""
    position_order: Literal["oldest", "newest"] = "oldest"
    """Positions are counted from the oldest or from the newest event of the sequence."""
    kernel: PositionalKernelConfig = field(default_factory=PositionalKernelConfig)
    residual: Literal["normalized", "input"] = "normalized"
    """What attention is added to: the normalized query (the original) or the block's input."""
    output_projection: bool = True
    """A linear layer after attention, as the PyTorch ports have; the original has none."""
    activation: str = "relu"
    scale_embedding: bool = True
    """Multiply item vectors by sqrt(width) at the input."""
    norm_epsilon: float = 1e-8
    init_scale: float = 0.02
    """Standard deviation of the normal initialisation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters are float32."""

    def check(self, *, max_length: int) -> None:
        for name in ("width", "blocks", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"config: model.{name} must be positive, got {getattr(self, name)}")
        if self.width % self.heads:
            raise UserError(
                f"config: model.width ({self.width}) must be a multiple of model.heads "
                f"({self.heads})"
            )
        if not self.norm_epsilon > 0:
            raise UserError(f"config: model.norm_epsilon must be positive, got {self.norm_epsilon}")
        if not self.init_scale >= 0:
            raise UserError(f"config: model.init_scale must not be negative, got {self.init_scale}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"config: model.dropout must be in [0, 1), got {self.dropout}")
        if self.feed_forward is not None and self.feed_forward < 1:
            raise UserError(f"config: model.feed_forward must be positive, got {self.feed_forward}")
        if self.activation not in names("activation"):
            raise UserError(
                f"config: unknown model.activation {self.activation!r}; known: "
                f"{', '.join(names('activation'))}"
            )
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
