"""Many processes: which data-parallel replica we are, and noise on DTensor embeddings.

A DTensor stands for one logical tensor, so its noise is the noise one process would add to it,
whatever its placements: the ranks of a tensor-parallel group share one replica and one seed, which
its first rank draws. What differs between replicas is the counter's word `replica`.
"""

import reprlib
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import reference
from .backends import choose_backend
from .noise import Noise, seed_tensor
from .samples import Samples
from .torch_internals import (
    asked_outside_the_graph,
    fsdp_classes,
    ranks_of_groups,
    root_mesh,
    sharded_parameters,
)

DISTRIBUTED = dist.is_available()  # by this torch's build
# GROUPS.WORLD is the process group, None without one. dist.is_initialized() says the same, but is a
# constant for Dynamo, which then compiles nothing anew when a group comes or goes.
GROUPS: Any = dist.GroupMember if DISTRIBUTED else types.SimpleNamespace(WORLD=None)
PASS_REPLICA = (
    "pass replica= to apply_neftune or NEFTuneEmbedding: a number that the ranks of one replica "
    "share and that no other replica has"
)


def has_group() -> bool:
    """The Dynamo of torch 2.10 takes WORLD for something in any case."""
    return GROUPS.WORLD is not None and dist.is_initialized()


def is_dtensor(value: Any) -> bool:
    """torch.distributed.tensor is imported only when somebody has a tensor that is neither a Tensor
    nor a Parameter.
    """
    if not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter) or not DISTRIBUTED:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


# ---- replicas


def data_parallel_index(
    weight: Tensor, embedding: nn.Module | None = None, model: nn.Module | None = None
) -> int:
    """Which data-parallel replica this process belongs to, asked at call time: the `replica` of
    :func:`apply_neftune` and :class:`NEFTuneEmbedding` unless told.

    - no process group, or one process: 0
    - FSDP2 (`fully_shard`, HSDP too): the rank in its flattened mesh
    - a DTensor weight: the index over the root mesh's dimensions that the weight's own mesh does
      not span; 0 where it spans the world
    - otherwise (DDP, the old FSDP): the rank

    Args:
        weight: the embedding's weight, as its forward sees it.
        embedding: the module that owns it, by which FSDP2 is recognised.
        model: where to look for DTensors, which beside an ordinary weight leave the question open.

    Raises:
        RuntimeError: it cannot be known; the message names `replica=`.

    Example:
        >>> data_parallel_index(torch.zeros(3, 2))
        0
    """
    if not has_group():
        return 0
    if dist.get_world_size() == 1:
        return dist.get_rank()
    mesh_info = None if embedding is None else _fsdp_mesh_info(embedding)
    if is_dtensor(weight):
        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        return (
            _index_in(mesh_info.mesh)
            if mesh_info is not None and not getattr(mesh_info, "is_spmd_mesh", False)
            else _index_outside(mesh)
        )
    if mesh_info is not None:
        return _index_in(mesh_info.mesh)
    if model is not None and any(is_dtensor(parameter) for parameter in model.parameters()):
        raise RuntimeError(
            "the embedding's weight is an ordinary tensor while other parameters of the model are "
            "DTensors, so which ranks see the same "
            f"tokens cannot be known: {PASS_REPLICA}"
        )
    return dist.get_rank()


def module_replica(embedding: nn.Module) -> int:
    """:func:`data_parallel_index` for a module, which sees no more than its own weight.

    Raises:
        RuntimeError: it cannot be known: beside a weight that is neither a DTensor nor FSDP2's
            there is a process group of some of the ranks; the message names `replica=`.
    """
    if not has_group():
        return 0
    weight: Any = embedding.weight
    if (
        not is_dtensor(weight)
        and _fsdp_mesh_info(embedding) is None
        and (group := _partial_group())
    ):
        raise RuntimeError(
            f"there is a process group of {group}, so which of them see the same tokens cannot be "
            "known from the embedding's weight: pass replica= to NEFTuneEmbedding, a number that "
            "the ranks of one data-parallel replica share and that no other replica has. That is "
            "torch.distributed.get_rank() where every rank has tokens of its own, the "
            "data-parallel rank beside tensor, pipeline or sequence parallelism"
        )
    return data_parallel_index(weight, embedding)


@asked_outside_the_graph  # torch's table of groups is no constant for Dynamo
def _partial_group() -> str:
    """The ranks, in words, of a group that has more than one of the world's and not all of them;
    empty without one.

    Ranks outside the group are told of the last one made: all ranks raise, and none is left
    waiting for the others.
    """
    size = dist.get_world_size()
    for group in ranks_of_groups():
        if 1 < len(group) < size:
            return f"{len(group)} of the {size} ranks ({reprlib.repr(sorted(group))})"
    return ""


@asked_outside_the_graph  # torch 2.11's Dynamo cannot follow a mesh's shape
def _index_in(mesh: Any) -> int:
    """This rank's place in the flattened mesh."""
    index = 0
    for place, size in zip(mesh.get_coordinate(), mesh.shape, strict=True):
        index = index * size + place
    return index


@asked_outside_the_graph  # Dynamo cannot follow the ranks, which are a tensor's values
def _index_outside(mesh: Any) -> int:
    """This rank's place in the root mesh, flattened over the dimensions along which `mesh` has no
    other rank.
    """
    root = root_mesh(mesh)
    if root.size() != dist.get_world_size():
        raise RuntimeError(
            f"the embedding's weight is a DTensor on {mesh}, whose root mesh has {root.size()} of "
            f"{dist.get_world_size()} processes, so "
            f"its data-parallel index cannot be known: slice it from a mesh of the whole world, "
            f"or {PASS_REPLICA}"
        )
    ranks, own = root.mesh, root.get_coordinate()
    inside = set(mesh.mesh.flatten().tolist())
    index = 0
    for dim, place in enumerate(own):
        line = ranks[(*own[:dim], slice(None), *own[dim + 1 :])].tolist()
        if sum(rank in inside for rank in line) == 1:
            index = index * len(line) + place
    return index


_mesh_infos: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _fsdp_mesh_info(module: nn.Module) -> Any:
    """FSDP2's mesh for this module's own parameters, None without FSDP2.

    In forward they are plain again: only FSDP's state knows.
    """
    if not module.__dict__.get("_is_fsdp_managed_module"):
        return None
    if module not in _mesh_infos:
        for parameter in sharded_parameters():
            if any(owner is module for owner in parameter.owners):
                _mesh_infos[module] = parameter.mesh_info
                break
        else:  # the old FSDP marks its modules alike
            return None
    return _mesh_infos[module]


# ---- noise on DTensors


class _AddConstant(torch.autograd.Function):
    """reference.add_noise, whose gradient passes through untouched."""

    @staticmethod
    def forward(embeddings: Tensor, noise: Tensor) -> Tensor:
        return reference.add_noise(embeddings, noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def shared_seed(seed: Tensor, weight: Tensor) -> Tensor:
    """The seed drawn by the first rank of a DTensor weight's mesh, on all of its ranks; for any
    other weight the seed itself.

    Seeded alike they draw alike only while their generators stay in step, which dropout on shards
    of unlike size ends.
    """
    if not is_dtensor(weight):
        return seed
    from torch.distributed import _functional_collectives as collectives

    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    for dim in range(mesh.ndim):
        seed = collectives.wait_tensor(collectives.broadcast(seed, 0, (mesh, dim)))
    return seed


def replicated(samples: Samples) -> Samples:
    """What tells the samples, as ordinary tensors of every token: the noise of one shard depends on
    the whole sample.
    """
    return samples._replace(
        **{
            name: value.full_tensor()
            for name, value in samples._asdict().items()
            if is_dtensor(value)
        }
    )


def dtensor_with_noise(
    add: Callable[[Tensor, Samples, Noise], Tensor],
    embedded: Any,
    samples: Samples,
    noise: Noise,
) -> Tensor:
    """`add` (lookup.embeds_with_noise) for a DTensor (..., T, d): the noise of the global tensor,
    each rank adding its own part.

    Partial sums (vocabulary-sharded lookups) are reduced first; every other placement stays. A
    given seed must be one for the whole mesh; a drawn one is the first rank's.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = embedded.device_mesh
    placements = tuple(
        Replicate() if placement.is_partial() else placement for placement in embedded.placements
    )
    if placements != embedded.placements:
        embedded = embedded.redistribute(placements=placements)
    local, samples = embedded.to_local(), replicated(samples)
    if noise.seed is None:
        drawn = seed_tensor(None, noise.generator, local.device)
        noise = noise._replace(seed=shared_seed(drawn, embedded), generator=None)
    if all(placement.is_replicate() for placement in placements):
        noisy = add(local, samples, noise)
    else:
        choose_backend(noise.backend, local.device, local.dtype)
        if local.dtype == torch.float64:
            noise = noise._replace(backend=None)
        zeros = torch.zeros((), dtype=torch.float32, device=local.device).expand(embedded.shape)
        whole = add(zeros, samples, noise)
        everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        noisy = _AddConstant.apply(local, everywhere.redistribute(placements=placements).to_local())
    return DTensor.from_local(
        noisy, mesh, placements, run_check=False, shape=embedded.shape, stride=embedded.stride()
    )


# ---- classes and forwards that the frameworks put on an embedding


def is_tensor_parallel_forward(forward: Any) -> bool:
    """transformers' tensor-parallel plan puts a function on the module that shards ids and output
    around the module's own forward.
    """
    return getattr(forward, "__name__", "") == "tp_forward" and getattr(
        forward, "__module__", ""
    ).startswith("transformers.")


def class_without_noise(swapped: type, base: type) -> type | None:
    """The class that fully_shard makes of `base`, for one that it made of `swapped`; None for any
    other class.
    """
    if not DISTRIBUTED:
        return None
    from torch.distributed.fsdp import FSDPModule

    made, classes = None, fsdp_classes()
    for origin, sharded in list(classes.items()):
        if sharded is swapped and sharded.__bases__ == (FSDPModule, origin):
            made = classes.get(base)
            if made is None:
                own = {"__deepcopy__": swapped.__dict__["__deepcopy__"]}
                made = classes[base] = type(f"FSDP{base.__name__}", (FSDPModule, base), own)
    return made
