"""What can be patched: a site of a layer, or one head or neuron of it, at some positions.

A ``Patch`` says *where* to write; what is written comes from a source (``recording.SourceValues``).
A ``PatchSet`` is written into one run at once. ``unit_patches`` lists all heads, MLPs, neurons or
residual states of a model; ``find_patch`` is one head or MLP by its name, ``L2H3`` or ``L2_MLP``.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from transformer_lens.model_bridge import TransformerBridge

from interp_kit.specs import InputError

Site = Literal["resid_pre", "z", "attn_out", "resid_mid", "neuron", "mlp_out", "resid_post"]
Place = tuple[Site, int]  # a site in a layer
Unit = Literal[
    "component", "head", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "neuron"
]

# In the order in which a block computes them. ``attn_out`` and ``mlp_out`` are what is added to the
# residual stream, after a post-norm where the model has one.
HOOKS: dict[Site, str] = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "neuron": "blocks.{}.mlp.out.hook_in",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}
SITES_OF_UNIT: dict[Unit, tuple[Site, ...]] = {
    "component": ("z", "mlp_out"),
    "head": ("z",),
    "attn_out": ("attn_out",),
    "mlp_out": ("mlp_out",),
    "resid_pre": ("resid_pre",),
    "resid_mid": ("resid_mid",),
    "resid_post": ("resid_post",),
    "neuron": ("neuron",),
}


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One place to write to: a site of a layer, or one head or neuron of it.

    ``head`` is for the site "z" and ``neuron`` for the site "neuron"; ``None`` is all of them.
    ``positions`` are token positions of the run that is patched, ascending; ``None`` is all.

    Raises ``InputError`` for a site that does not exist, a negative layer, head, neuron or
    position, a head or neuron of another site, and for positions that do not ascend.
    """

    layer: int
    site: Site
    head: int | None = None
    neuron: int | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.site not in HOOKS:
            known = ", ".join(get_args(Site))
            raise InputError(f"expected a site of {known}; got {self.site!r}")
        if self.layer < 0:
            raise InputError(f"expected a layer of 0 or more, got {self.layer}")
        self._check_unit("head", self.head, "z")
        self._check_unit("neuron", self.neuron, "neuron")
        at = self.positions or ()
        if any(pos < 0 for pos in at[:1]) or any(pos >= after for pos, after in pairwise(at)):
            raise InputError(
                f"expected ascending positions of 0 or more, each once; got {self.positions}: sort "
                "them, and count from the first token"
            )

    def _check_unit(self, name: str, unit: int | None, site: Site) -> None:
        if unit is None:
            return
        if self.site != site:
            raise InputError(
                f"a {name} is patched at site {site!r}, got {name}={unit} with site {self.site!r}; "
                f"change the site, or leave out {name}="
            )
        if unit < 0:
            raise InputError(
                f"expected a {name} of 0 or more, got {unit}; leave out {name}= for all of them"
            )

    @property
    def place(self) -> Place:
        return self.site, self.layer

    @property
    def unit(self) -> int | None:
        """The head or the neuron; ``None`` for the whole site."""
        return self.neuron if self.head is None else self.head

    @property
    def component(self) -> str:
        """Its name in tables: ``L2H3``, ``L2N17``, ``L2_MLP``, ``L2_ATTN``, ``L2_RESID_MID``."""
        if self.head is not None:
            return f"L{self.layer}H{self.head}"
        if self.neuron is not None:
            return f"L{self.layer}N{self.neuron}"
        name = {"mlp_out": "MLP", "attn_out": "ATTN"}.get(self.site, self.site.upper())
        return f"L{self.layer}_{name}"


EMBEDDING = Patch(layer=0, site="resid_pre")  # what enters the first block
PatchSet = frozenset[Patch]
UNPATCHED: PatchSet = frozenset()


def unit_patches(bridge: TransformerBridge, unit: Unit, *, layer: int | None = None) -> list[Patch]:
    """Every patch of one kind, each at all positions; by layer, heads before the MLP.

    ``unit``: "component" is every head (site "z") and every MLP (site "mlp_out") that the model
    has; the others are
    the site of that name, "head" and "neuron" one by one. ``layer`` keeps to one layer.

    Raises ``InputError`` for a layer or a site that the model does not have (a mixture of experts
    has no "neuron"), and for neurons without ``layer``.
    """
    cfg = bridge.cfg
    if layer is not None and not 0 <= layer < cfg.n_layers:
        raise InputError(f"layer {layer} does not exist; expected 0 to {cfg.n_layers - 1}")
    if unit == "neuron" and layer is None:
        raise InputError("neurons are patched in one layer at a time; give layer=")
    layers = range(cfg.n_layers) if layer is None else [layer]
    sites = SITES_OF_UNIT[unit]
    if unit == "component" and HOOKS["mlp_out"].format(layers[0]) not in bridge.hook_dict:
        sites = ("z",)  # the model is attention only
    for site in sites:
        name = HOOKS[site].format(layers[0])
        if name not in bridge.hook_dict:
            raise InputError(
                f"this model has no {name}, so unit {unit!r} cannot be patched; "
                f"expected a unit that it has, such as 'component' or 'resid_pre'"
            )
    return [patch for at in layers for site in sites for patch in _of(bridge, site, at)]


def find_patch(bridge: TransformerBridge, name: str) -> Patch:
    """The head or MLP called ``name`` (``L2H3``, ``L2_MLP``); ``InputError`` if there is none."""
    known = {patch.component: patch for patch in unit_patches(bridge, "component")}
    if name not in known:
        last = bridge.cfg.n_layers - 1
        raise InputError(
            f"unknown component {name!r}; expected L0H0 to L{last}H{bridge.cfg.n_heads - 1}, or "
            f"L0_MLP to L{last}_MLP"
        )
    return known[name]


def _of(bridge: TransformerBridge, site: Site, layer: int) -> list[Patch]:
    if site == "z":
        return [Patch(layer=layer, site=site, head=head) for head in range(bridge.cfg.n_heads)]
    if site == "neuron":
        return [Patch(layer=layer, site=site, neuron=n) for n in range(bridge.cfg.d_mlp or 0)]
    return [Patch(layer=layer, site=site)]
