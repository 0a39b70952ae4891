"""Several processes (gloo, CPU): every rank adds the noise one process would add, and data-parallel
replicas get noise of their own.

Each test spawns its processes once and runs its checks inside; a failing check's traceback comes
back through spawn. Ranks are seeded alike throughout, as trainers do.
"""

import copy
import itertools
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from neftune_kernels import (
    NEFTuneEmbedding,
    add_noise,
    apply_neftune,
    neftune_noise,
    noisy_embedding,
)
from neftune_kernels.distributed import data_parallel_index, module_replica

VOCAB, HIDDEN, COLUMNS = 13, 21, 7  # none of them even


class Model(nn.Module):
    def __init__(self, dtype=torch.float32, embedding=nn.Embedding, tied=False, **options):
        super().__init__()
        self.embed = embedding(VOCAB, HIDDEN, padding_idx=0, dtype=dtype, **options)
        self.middle = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.embed.weight[0, ::2] = -0.0
        if tied:
            self.head.weight = self.embed.weight

    def embedded(self, input_ids, attention_mask):
        """A NEFTuneEmbedding is handed its mask, apply_neftune finds it by itself."""
        if isinstance(self.embed, NEFTuneEmbedding):
            return self.embed(input_ids, attention_mask=attention_mask)
        return self.embed(input_ids)

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.middle(self.embedded(input_ids, attention_mask))))


class Embedder(Model):
    """The embedding alone, so that nothing between it and the caller touches its output."""

    def forward(self, input_ids, attention_mask=None):
        return self.embedded(input_ids, attention_mask)


def noisy_embedder(by_hand):
    """Noise by a NEFTuneEmbedding of one's own, or by apply_neftune."""
    if by_hand:
        return Embedder(embedding=NEFTuneEmbedding)
    model = Embedder()
    apply_neftune(model, 5.0, embedding="embed")
    return model


def batch():
    ids = torch.randint(VOCAB, (4, COLUMNS), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(COLUMNS) < torch.tensor([[COLUMNS], [5], [2], [0]])).long()
    return ids, mask


def drawn_after(seed):
    torch.manual_seed(seed)
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None)


def one_process(dtype=torch.float32, replica=0, scale=1.0, alpha=5.0, **samples):
    """Output and weight of a lookup in one process, after torch.manual_seed(3)."""
    weight = Model(dtype).embed.weight
    samples = samples or {"attention_mask": batch()[1]}
    return noisy_embedding(
        batch()[0],
        weight,
        alpha,
        padding_idx=0,
        embed_scale=scale,
        seed=drawn_after(3),
        replica=replica,
        **samples,
    ), weight


def run(model, *args, **kwargs):
    torch.manual_seed(3)
    return model(*args, **kwargs)


def _worker(rank, folder, processes, check, environment):
    torch.set_num_threads(1)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    if "MASTER_PORT" not in environment:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes
        )
    try:
        check(rank, str(folder))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def spawn(folder, processes, check, **environment):
    torch.multiprocessing.spawn(
        _worker, args=(folder, processes, check, environment), nprocs=processes
    )


def gathered(tensor):
    """The tensor of every rank."""
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor.detach().contiguous())
    return tensors


# ---- tensor parallel

STYLES = {
    "rows": (RowwiseParallel, {"input_layouts": Replicate()}, None),
    "rows, sequence-sharded": (
        RowwiseParallel,
        {"input_layouts": Replicate(), "output_layouts": Shard(1)},
        1,
    ),
    "rows, DTensor out": (
        RowwiseParallel,
        {"input_layouts": Replicate(), "use_local_output": False},
        None,
    ),
    "columns": (ColwiseParallel, {}, 2),
    "columns, replicated": (ColwiseParallel, {"output_layouts": Replicate()}, None),
    "columns, sequence-sharded": (ColwiseParallel, {"output_layouts": Shard(1)}, 1),
}


def whole_numbers(like):
    """A gradient whose sums are exact in any order, in bfloat16 too: ours or torch's own."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-2, 3, like.shape, generator=generator).to(like.dtype)


def assert_equals_one_process(out, model, expected, expected_weight, shard_dim, mesh, what):
    """Output and weight gradient of this rank's part against the whole."""
    gradient = whole_numbers(expected)
    expected.backward(gradient)
    expected = expected.detach()
    out = out.full_tensor() if isinstance(out, DTensor) else out
    if shard_dim is not None:
        expected, gradient = (
            part.chunk(mesh.size(), shard_dim)[mesh.get_local_rank()]
            for part in (expected, gradient)
        )
    assert torch.equal(out, expected), what
    out.backward(gradient)
    assert torch.equal(model.embed.weight.grad.full_tensor(), expected_weight.grad), what


def check_tensor_parallel(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    ids, mask = batch()
    replicated_mask = DTensor.from_local(mask, mesh, [Replicate()])
    sharded_mask = distribute_tensor(mask, mesh, [Shard(1)])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for name, (style, layouts, shard_dim) in STYLES.items():
            for order in ("before", "after", "module"):
                what = f"{name}, {order}, {dtype}"
                model = Embedder(dtype, NEFTuneEmbedding if order == "module" else nn.Embedding)
                if order == "before":
                    apply_neftune(model, 5.0, embedding="embed")
                parallelize_module(model, mesh, {"embed": style(**layouts)})
                if order == "after":
                    apply_neftune(model, 5.0, embedding="embed")
                given = {"before": mask, "after": replicated_mask, "module": sharded_mask}[order]
                caller = model.embed if order == "module" else model
                out = run(caller, ids, attention_mask=given)
                assert_equals_one_process(out, model, *one_process(dtype), shard_dim, mesh, what)

    # padding by padding_idx alone, the scale, offsets, cumulative lengths
    for name, (style, layouts, shard_dim) in STYLES.items():
        model = Embedder(torch.bfloat16, NEFTuneEmbedding, embed_scale=1.5)
        parallelize_module(model, mesh, {"embed": style(**layouts)})
        for samples in (
            {"attention_mask": None},
            {
                "position_offset": 3,
                "sample_offset": 2,
                "replica": 7,
                "lengths": torch.tensor([9, 4, 0, 8]),
            },
            {"cu_seqlens": torch.tensor([0, 6, 28])},
        ):
            model.zero_grad()
            out = run(model.embed, ids, **samples)
            expected = one_process(torch.bfloat16, scale=1.5, **{"replica": 0, **samples})
            assert_equals_one_process(
                out, model, *expected, shard_dim, mesh, f"{name} with {samples}"
            )

    # a batch-sharded DTensor is one global batch
    model = Embedder(embedding=NEFTuneEmbedding)
    model.embed.weight = nn.Parameter(
        DTensor.from_local(model.embed.weight.detach(), mesh, [Replicate()])
    )
    out = run(model.embed, distribute_tensor(ids, mesh, [Shard(0)]), attention_mask=mask)
    assert out.placements == (Shard(0),)
    expected, weight = one_process()
    assert torch.equal(out.to_local(), expected.chunk(2)[rank])

    # no noise: the very lookup of torch, no draw; stats and undo
    model = Embedder()
    handle = apply_neftune(model, 5.0, embedding="embed")
    parallelize_module(model, mesh, {"embed": ColwiseParallel()})
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(ids), nn.functional.embedding(ids, weight).chunk(2, 2)[rank])
    assert torch.equal(torch.get_rng_state(), state)
    run(model.train(), ids, attention_mask=replicated_mask)
    stats = handle.stats()
    assert (stats["samples"], stats["length_min"], stats["length_max"]) == (3, 2, COLUMNS)
    assert 0.9 < stats["max_noise_ratio"] < 1
    handle.remove()
    assert type(model.embed) is nn.Embedding
    assert torch.equal(run(model, ids), nn.functional.embedding(ids, weight).chunk(2, 2)[rank])

    # a shape that does not fit is refused, as in one process
    model = Embedder(embedding=NEFTuneEmbedding)
    parallelize_module(model, mesh, {"embed": ColwiseParallel()})
    with pytest.raises(
        ValueError, match=r"attention_mask must have the tokens' shape \(4, 7\), got \(4, 3\)"
    ):
        model.embed(ids, attention_mask=mask[:, :3])
    with pytest.raises(ValueError, match="float64 is served by the reference backend alone"):
        wide = Embedder(torch.float64, NEFTuneEmbedding, backend="cpp")
        parallelize_module(wide, mesh, {"embed": ColwiseParallel()})
        wide.embed(ids, attention_mask=mask)


def test_tensor_parallel_equals_one_process(tmp_path):
    spawn(tmp_path, 2, check_tensor_parallel)


# ---- data parallel


def check_data_parallel(rank, folder):
    ids, mask = batch()
    losses, gradients = [], []
    for _ in range(2):
        model = Model()
        apply_neftune(model, 5.0, embedding="embed")
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(3)
        for _ in range(2):
            loss = wrapped(ids, attention_mask=mask).square().mean()
            loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert torch.equal(*losses), "run to run"
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True)), "run to run"
    assert not torch.equal(*gathered(losses[0])), "both ranks drew one noise"

    model = Embedder()
    apply_neftune(model, 5.0, embedding="embed")
    out = run(nn.parallel.DistributedDataParallel(model), ids, attention_mask=mask)
    assert torch.equal(out, one_process(replica=rank)[0])
    assert not torch.equal(*gathered(out))

    # the old FSDP wants an accelerator; all we see of it is its mark, which FSDP2 leaves too
    model.embed._is_fsdp_managed_module = True
    assert data_parallel_index(model.embed.weight, model.embed) == rank

    # replica= overrules
    model = Embedder()
    apply_neftune(model, 5.0, embedding="embed", replica=9)
    assert torch.equal(run(model, ids, attention_mask=mask), one_process(replica=9)[0])

    # an ordinary embedding beside DTensors: TP ranks see the same tokens, other meshes' may not
    model = Model()
    apply_neftune(model, 5.0, embedding="embed")
    parallelize_module(
        model,
        init_device_mesh("cpu", (2,)),
        {"middle": ColwiseParallel(output_layouts=Replicate())},
    )
    with pytest.raises(
        RuntimeError,
        match="ordinary tensor while other parameters of the model are DTensors.*replica=",
    ):
        model(ids, attention_mask=mask)
    model.eval()(ids)
    apply_neftune(model.train(), 5.0, embedding="embed", replica=0)
    outputs = gathered(run(model, ids, attention_mask=mask))
    assert torch.equal(*outputs)


def test_data_parallel_ranks_draw_noise_of_their_own(tmp_path):
    spawn(tmp_path, 2, check_data_parallel)


def check_module(rank, folder):
    """Not a word of the ranks from the user."""
    ids, mask = batch()
    model = Embedder(embedding=NEFTuneEmbedding)
    embedding = model.embed
    assert embedding.replica is None

    def replica_drawn(**said):
        """The replica whose noise the module adds."""
        out = run(embedding, ids, attention_mask=mask, **said)
        (found,) = (
            replica for replica in range(9) if torch.equal(out, one_process(replica=replica)[0])
        )
        return found

    assert replica_drawn() == rank
    out = run(nn.parallel.DistributedDataParallel(model), ids, attention_mask=mask)
    assert torch.equal(out, one_process(replica=rank)[0])
    assert not torch.equal(*gathered(out)), "both ranks drew one noise"

    # groups that leave nobody out, or hold nobody else: gloo beside nccl, a mesh, one rank each
    dist.new_group([0, 1])
    assert replica_drawn() == rank
    init_device_mesh("cpu", (2,))
    init_device_mesh("cpu", (2, 1))
    dist.new_subgroups(1)
    assert replica_drawn() == rank

    # what is said counts, at the call before the module's own
    assert replica_drawn(replica=0) == 0 and replica_drawn(replica=7) == 7
    embedding.replica = 8
    assert (replica_drawn(), replica_drawn(replica=0)) == (8, 0)
    embedding.replica = 0
    assert replica_drawn() == 0
    embedding.replica = None
    with pytest.raises(ValueError, match=r"replica must lie in \[0, 2\*\*32\), got -1"):
        embedding(ids, replica=-1)

    # a copy works out its own
    embedding = copy.deepcopy(embedding)
    assert embedding.replica is None and replica_drawn() == rank

    # the functions are pure: replica 0 unless said
    expected, weight = one_process(replica=0)
    told = {"attention_mask": mask, "seed": drawn_after(3)}
    lookup = nn.functional.embedding(ids, weight)
    assert torch.equal(noisy_embedding(ids, weight, 5.0, padding_idx=0, **told), expected)
    assert torch.equal(add_noise(lookup, 5.0, **told), expected)
    assert torch.equal(lookup + neftune_noise(ids.shape, HIDDEN, 5.0, **told), expected)

    # a process group that goes and one that comes, for what was compiled before as well
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(embedding, fullgraph=True, backend=counter)

    def compiled_noise(replica, seed):
        out = compiled(ids, attention_mask=mask, seed=seed)
        plain = noisy_embedding(
            ids, embedding.weight, 5.0, attention_mask=mask, seed=seed, replica=replica
        )
        assert torch.equal(out, plain)

    compiled_noise(rank, torch.tensor(0))
    graphs = counter.frame_count
    for seed in (1, 2):
        compiled_noise(rank, torch.tensor(seed))
    assert counter.frame_count == graphs, "compiled anew for a call"
    dist.destroy_process_group()
    assert replica_drawn() == 0
    compiled_noise(0, torch.tensor(1))
    dist.init_process_group("gloo", init_method=f"file://{folder}/more", rank=rank, world_size=2)
    assert replica_drawn() == rank
    for seed in (1, 2):
        compiled_noise(rank, torch.tensor(seed))
    assert counter.frame_count == graphs + 2, "compiled anew for more than a change of groups"


def test_module_works_its_replica_out(tmp_path):
    spawn(tmp_path, 2, check_module)


def check_partial_group(rank, folder):
    """Two of three ranks have a group of their own; the third, which is not in it, raises too and
    does not wait for them in the next collective.
    """
    ids, mask = batch()
    embedding = Embedder(embedding=NEFTuneEmbedding).embed
    assert module_replica(embedding) == rank
    mesh, swapped = init_device_mesh("cpu", (3,)), DeviceMesh("cpu", [2, 0, 1])
    assert module_replica(embedding) == rank, "a mesh of all ranks has no group of some"
    group = dist.new_group([0, 1])
    plain = one_process(replica=0)[0]
    refusal = (
        r"process group of 2 of the 3 ranks \(\[0, 1\]\), .*pass replica= to NEFTuneEmbedding"
        r".*get_rank\(\) where every rank has tokens of its own"
    )
    with pytest.raises(RuntimeError, match=refusal):
        embedding(ids, attention_mask=mask)
    compiled = torch.compile(embedding, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=refusal):  # Dynamo's own around it
        compiled(ids, attention_mask=mask)
    torch._dynamo.reset()
    clean = nn.functional.embedding(ids, embedding.weight)
    assert torch.equal(embedding.eval()(ids), clean), "without noise nothing is asked"
    embedding.train().noise_alpha = 0
    assert torch.equal(embedding(ids), clean)
    embedding.noise_alpha = 5.0
    assert torch.equal(run(embedding, ids, attention_mask=mask, replica=0), plain)
    said = Embedder(embedding=NEFTuneEmbedding, replica=0).embed
    assert torch.equal(run(said, ids, attention_mask=mask), plain)

    # where the weight tells, the group is nobody's business
    model = Embedder(embedding=NEFTuneEmbedding)
    fully_shard(model, mesh=swapped)
    place = (1, 2, 0)[rank]
    assert torch.equal(run(model, ids, attention_mask=mask), one_process(replica=place)[0])
    model = Embedder(embedding=NEFTuneEmbedding)
    parallelize_module(model, mesh, {"embed": ColwiseParallel(output_layouts=Replicate())})
    assert torch.equal(run(model, ids, attention_mask=mask), plain)

    if rank < 2:  # torch does not tell the third
        dist.destroy_process_group(group)
        assert torch.equal(run(embedding, ids, attention_mask=mask), one_process(replica=rank)[0])


def test_group_of_some_ranks_is_refused_beside_a_plain_weight(tmp_path):
    spawn(tmp_path, 3, check_partial_group)


def check_fsdp2(rank, folder):
    ids, mask = batch()
    swapped = DeviceMesh("cpu", [1, 0])  # here the rank in FSDP's mesh is not the rank
    replica = 1 - rank
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for order in ("before", "after"):
        for parts in (("embed", "middle"), ("middle",)):
            for policy, dtype in ((MixedPrecisionPolicy(), torch.float32), (mixed, torch.bfloat16)):
                what = f"{order} {parts} {dtype}"
                model = Embedder()
                names = list(model.state_dict())
                if order == "before":
                    handle = apply_neftune(model, 5.0, embedding="embed")
                for part in parts:
                    fully_shard(getattr(model, part), mesh=swapped, mp_policy=policy)
                fully_shard(model, mesh=swapped, mp_policy=policy)
                if order == "after":
                    handle = apply_neftune(model, 5.0, embedding="embed")
                out = run(model, ids, attention_mask=mask)
                weight = Model().embed.weight.to(dtype).detach().requires_grad_()
                expected = noisy_embedding(
                    ids,
                    weight,
                    5.0,
                    attention_mask=mask,
                    padding_idx=0,
                    seed=drawn_after(3),
                    replica=replica,
                )
                assert torch.equal(out, expected), what
                assert not torch.equal(*gathered(out)), what
                gradient = torch.randn(
                    expected.shape, generator=torch.Generator().manual_seed(rank)
                ).to(dtype)
                expected.backward(gradient)
                out.backward(gradient)
                first, second = gathered(weight.grad)
                mean = ((first + second) / 2).float()  # what FSDP itself reduces to
                assert torch.equal(model.embed.weight.grad.full_tensor(), mean), what
                assert list(model.state_dict()) == names, what
                handle.remove()
                assert type(model.embed).__name__ == (
                    "FSDPEmbedding" if "embed" in parts else "Embedding"
                ), what
                expected_classes = (
                    (FSDPModule, *nn.Embedding.__mro__)
                    if "embed" in parts
                    else nn.Embedding.__mro__[1:]
                )
                assert type(model.embed).__mro__[1:] == expected_classes, what
                clean = nn.functional.embedding(ids, Model().embed.weight.to(dtype))
                assert torch.equal(run(model, ids, attention_mask=mask), clean), what

    # tied head; checkpoints: no key is ours, values come back (on a mesh in rank order: torch's
    # loader mixes up the shards of any other)
    for order in ("before", "after"):
        model = Model(tied=True)
        reference = Model(tied=True)
        if order == "before":
            apply_neftune(model, 5.0, embedding="embed")
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        if order == "after":
            apply_neftune(model, 5.0, embedding="embed")
        out = run(model, ids, attention_mask=mask)
        apply_neftune(reference, 5.0, embedding="embed", replica=rank)
        expected = run(reference, ids, attention_mask=mask)
        assert torch.equal(out, expected), order
        out.sum().backward()
        expected.sum().backward()
        first, second = gathered(reference.embed.weight.grad)
        assert torch.equal(model.embed.weight.grad.full_tensor(), (first + second) / 2), order
        assert model.embed.weight is model.head.weight

        saved = get_model_state_dict(model)
        assert list(saved) == list(get_model_state_dict(Model(tied=True)))
        dcp.save(saved, checkpoint_id=f"{folder}/{order}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loaded = get_model_state_dict(model)
        dcp.load(loaded, checkpoint_id=f"{folder}/{order}")
        set_model_state_dict(model, loaded)
        for name, value in Model(tied=True).state_dict().items():
            assert torch.equal(model.state_dict()[name].full_tensor(), value), f"{order} {name}"


def test_fsdp2(tmp_path):
    spawn(tmp_path, 2, check_fsdp2)


class Scaled(nn.Module):
    """An inner model that multiplies, inside which the look at it stops."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.inner = Model(dtype)
        self.inner.embedded = lambda ids, mask: self.inner.embed(ids) * 6.0

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids, attention_mask)


def check_look_under_fsdp2(rank, folder):
    ids, mask = batch()
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    shards = (("inner.embed", "inner.middle"), ("inner.middle",), ("inner",), ())
    policies = ((MixedPrecisionPolicy(), torch.float32), (mixed, torch.bfloat16))
    cases = itertools.product(("before", "after"), shards, policies)
    for order, parts, (policy, dtype) in cases:
        what = f"{order} {parts} {dtype}"
        model, plain = Scaled(), Scaled(dtype)
        if order == "before":
            apply_neftune(model, 5.0, embedding="inner.embed")
        for part in parts:
            fully_shard(model.get_submodule(part), mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        if order == "after":
            apply_neftune(model, 5.0, embedding="inner.embed")
        apply_neftune(plain, 5.0, embedding="inner.embed", embedding_multiplier=6.0)
        for step in range(2):
            for parameter in (*model.parameters(), *plain.parameters()):
                parameter.grad = None
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                out = run(model, ids, attention_mask=mask)
            told = [one for one in said if "embedding_multiplier=6.0" in str(one.message)]
            assert len(told) == (step == 0), (what, step, [str(one.message) for one in said])
            expected = run(plain, ids, attention_mask=mask)
            assert torch.equal(out, expected), what
            out.square().sum().backward()
            expected.square().sum().backward()
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                first, second = gathered(other.grad)
                mean = ((first + second) / 2).float()  # what FSDP itself reduces to
                assert torch.equal(one.grad.full_tensor(), mean), what


def test_a_look_under_fsdp2(tmp_path):
    spawn(tmp_path, 2, check_look_under_fsdp2)


# ---- meshes of two dimensions


def check_meshes(rank, folder):
    ids, mask = batch()
    styles = {
        name: STYLES[name] for name in ("rows, sequence-sharded", "columns", "columns, replicated")
    }
    # of ranks [[0, 2], [1, 3]] the replica is rank % 2, not rank // 2; with tensor parallelism in
    # the first dimension likewise
    meshes = (
        (DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("dp", "tp")), rank % 2),
        (init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp")), rank % 2),
        (init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), rank // 2),
        (init_device_mesh("cpu", (1, 2, 2, 1), mesh_dim_names=("pp", "dp", "tp", "cp")), rank // 2),
    )
    for mesh, replica in meshes:
        for name, (style, layouts, shard_dim) in styles.items():
            for fsdp, by_hand in itertools.product((False, True), repeat=2):
                what = f"{mesh} {name} fsdp={fsdp} by hand={by_hand}"
                model = noisy_embedder(by_hand)
                parallelize_module(model, mesh["tp"], {"embed": style(**layouts)})
                if fsdp:
                    fully_shard(model, mesh=mesh["dp"])
                out = run(model, ids, attention_mask=mask)
                expected, weight = one_process(replica=replica)
                assert_equals_one_process(out, model, expected, weight, shard_dim, mesh["tp"], what)

    # HSDP: every rank is a replica of its own, numbered along the mesh
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replicate", "shard"))
    place = (0, 2, 1, 3)[rank]
    for by_hand in (False, True):
        model = noisy_embedder(by_hand)
        fully_shard(model, mesh=mesh)
        assert torch.equal(run(model, ids, attention_mask=mask), one_process(replica=place)[0])

    # the meshes' groups beside a plain weight: here every rank is asked
    with pytest.raises(RuntimeError, match="process group of 2 of the 4 ranks.*pass replica="):
        noisy_embedder(by_hand=True)(ids, attention_mask=mask)

    # two meshes that know nothing of each other: nobody can tell which replica this is
    halves = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]
    for by_hand in (False, True):
        model = noisy_embedder(by_hand)
        parallelize_module(model, halves[rank // 2], {"embed": ColwiseParallel()})
        with pytest.raises(
            RuntimeError,
            match="2 of 4 processes, so its data-parallel index cannot be known.*pass replica= to "
            "apply_neftune or NEFTuneEmbedding",
        ):
            model(ids, attention_mask=mask)
        if by_hand:
            model.embed.replica = rank // 2
        else:
            apply_neftune(model, 5.0, embedding="embed", replica=rank // 2)
        assert torch.equal(
            run(model, ids, attention_mask=mask),
            one_process(replica=rank // 2)[0].chunk(2, 2)[rank % 2],
        )


def test_two_dimensional_meshes(tmp_path):
    spawn(tmp_path, 4, check_meshes)


# ---- torch.compile


def check_compiled(rank, folder):
    ids, mask = batch()
    mesh, swapped = init_device_mesh("cpu", (2,)), DeviceMesh("cpu", [1, 0])
    pairs = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    cases = {
        "plain": (lambda model: model, rank),
        "fsdp": (lambda model: fully_shard(model, mesh=swapped), 1 - rank),
        "tp": (
            lambda model: parallelize_module(
                model, mesh, {"embed": ColwiseParallel(output_layouts=Replicate())}
            ),
            0,
        ),
        "dp x tp": (
            lambda model: parallelize_module(model, pairs["tp"], {"embed": ColwiseParallel()}),
            rank,
        ),
    }
    for (name, (parallelise, replica)), by_hand in itertools.product(cases.items(), (False, True)):
        model = noisy_embedder(by_hand)
        parallelise(model)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        what = f"{name} by hand={by_hand}"
        expected = one_process(replica=replica)[0]
        for _ in range(2):  # FSDP2 sets itself up in the first call, and is compiled again
            assert torch.equal(run(compiled, ids, attention_mask=mask), expected), what
        graphs = counter.frame_count
        assert torch.equal(run(compiled, ids, attention_mask=mask), expected), what
        assert counter.frame_count == graphs, f"{what}: compiled anew for a call"


def test_compiled_noise_is_the_eager_one_in_one_graph(tmp_path):
    spawn(tmp_path, 2, check_compiled)


# ---- transformers' plan


def make_llama():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB * 2 + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    return transformers.LlamaForCausalLM(config)


def check_transformers_plan(rank, folder):
    import transformers
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    ids, mask = batch()
    ids = ids + VOCAB
    reference = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/llama").train()
    weight = reference.model.embed_tokens.weight

    def embedded(model):
        seen = []
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        logits = run(model, input_ids=ids, attention_mask=mask).logits
        hook.remove()
        return seen[0], logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from_pretrained(tp_plan=) warns of its own deprecation
        model = transformers.LlamaForCausalLM.from_pretrained(
            f"{folder}/llama", tp_plan="auto"
        ).train()
    assert dist.get_world_size() == 2  # transformers made the group from torchrun's variables
    embedding = model.model.embed_tokens
    assert isinstance(embedding.weight, DTensor) and embedding.weight.placements[-1] == Shard(0)
    plan = embedding.__dict__["forward"]
    clean, clean_logits = embedded(model)
    handle = apply_neftune(model, 5.0)
    assert apply_neftune(model, 5.0) is handle
    out, logits = embedded(model)
    expected = noisy_embedding(
        ids, weight, 5.0, attention_mask=mask, seed=drawn_after(3), replica=0
    )
    assert torch.equal(out, expected)
    assert torch.equal(*gathered(logits)), "noise differs inside the tensor-parallel group"
    gradient = whole_numbers(expected)
    (grad,) = torch.autograd.grad(out, embedding.weight, gradient, retain_graph=True)
    assert torch.equal(grad.full_tensor(), torch.autograd.grad(expected, weight, gradient)[0])
    assert handle.stats()["samples"] == 3
    assert torch.equal(embedded(model.eval())[0], clean)
    handle.remove()
    assert embedding.__dict__["forward"] is plan and type(embedding) is nn.Embedding
    assert not [name for name in vars(embedding) if "neftune" in name]
    assert torch.equal(embedded(model.train())[1], clean_logits)

    # the plan after apply_neftune
    mesh = init_device_mesh("cpu", (2,))
    for style in ("embedding_rowwise", "embedding_colwise"):
        model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/llama").train()
        handle = apply_neftune(model, 5.0)
        apply_tensor_parallelism(
            model, mesh, {"model.embed_tokens": style, "model.embed_tokens.weight": style}
        )
        embedding = model.model.embed_tokens
        assert isinstance(embedding.weight, DTensor)
        out, _ = embedded(model)
        assert torch.equal(out, expected), style
        (grad,) = torch.autograd.grad(out, embedding.weight, gradient)
        assert torch.equal(
            grad.full_tensor(),
            torch.autograd.grad(noisy_embedding(ids, weight, 0.0), weight, gradient)[0],
        ), style
        handle.remove()  # the plan stays, and still calls the method that it found
        assert torch.equal(embedded(model)[0], nn.functional.embedding(ids, weight)), style
        assert type(embedding) is nn.Embedding and "_neftune" not in vars(embedding)


def test_transformers_tensor_parallel_plan(tmp_path):
    pytest.importorskip("transformers")
    make_llama().save_pretrained(tmp_path / "llama")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(tmp_path, 2, check_transformers_plan, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


# ---- sequence parallel

LONG, LENGTHS = 24, (24, 17, 6, 0)


def sequence_splits(processes):
    """Every rank's columns under plain, Ulysses (both contiguous) and zig-zag splits, ring
    attention's chunks r and 2n-1-r.
    """
    columns = torch.arange(LONG)
    yield "contiguous", list(columns.chunk(processes))
    chunks = columns.chunk(2 * processes)
    yield (
        "zig-zag",
        [torch.cat((chunks[rank], chunks[2 * processes - 1 - rank])) for rank in range(processes)],
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("processes", (2, 3))
def test_sequence_shards_equal_the_whole(processes, dtype):
    embedding = NEFTuneEmbedding(VOCAB, HIDDEN, padding_idx=0, dtype=dtype)
    ids = torch.randint(VOCAB, (len(LENGTHS), LONG), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(LENGTHS)
    whole = embedding(ids, lengths=lengths, seed=5)
    for name, shards in sequence_splits(processes):
        parts, more = [], []
        for columns in shards:
            part, places = ids[:, columns], columns.expand(len(LENGTHS), -1)
            parts.append(embedding(part, lengths=lengths, position_ids=places, seed=5))
            more.append(
                add_noise(
                    nn.functional.embedding(part, embedding.weight),
                    5.0,
                    lengths=lengths,
                    position_ids=places,
                    seed=5,
                )
            )
            if name == "contiguous":
                offset = int(columns[0])
                assert torch.equal(
                    embedding(part, lengths=lengths, position_offset=offset, seed=5), parts[-1]
                )
                assert torch.equal(
                    noisy_embedding(
                        part, embedding.weight, 5.0, lengths=lengths, position_offset=offset, seed=5
                    ),
                    parts[-1],
                )
        back = torch.cat(shards).argsort()
        assert torch.equal(torch.cat(parts, 1)[:, back], whole), name
        assert torch.equal(torch.cat(more, 1)[:, back], whole), name
        local = torch.tensor(
            [int((places < length).sum()) for length in LENGTHS for places in shards[:1]]
        )
        wrong = embedding(ids[:, shards[0]], lengths=local, seed=5)
        assert not torch.equal(wrong, whole[:, shards[0]]), (
            "the local length would do as well: this test could not fail"
        )


def check_context_parallel(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    embedding = NEFTuneEmbedding(VOCAB, HIDDEN)
    embedding.weight = Model().embed.weight
    ids = torch.randint(VOCAB, (len(LENGTHS), LONG), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(LENGTHS)
    whole = noisy_embedding(ids, embedding.weight, 5.0, lengths=lengths, seed=5)
    places = torch.arange(LONG)[None].clone()
    mine, where = ids.clone(), places.clone()
    with context_parallel(mesh, buffers=[mine, where], buffer_seq_dims=[1, 1]):
        assert mine.shape == (len(LENGTHS), LONG // 2) and where.shape == (1, LONG // 2)
        columns = where[0].clone()
        assert columns.tolist() != list(range(LONG // 2 * rank, LONG // 2 * (rank + 1))), (
            "balanced: not contiguous"
        )
        out = embedding(mine, lengths=lengths, position_ids=where, seed=5, replica=0)
        alone = embedding(mine, lengths=lengths, position_ids=where, seed=5)
    assert torch.equal(out, whole[:, columns])
    assert torch.cat(gathered(columns)).sort().values.tolist() == list(range(LONG))
    # Nothing tells such ranks from data-parallel ones: they must be given one replica.
    assert data_parallel_index(embedding.weight) == module_replica(embedding) == rank
    assert torch.equal(alone, whole[:, columns]) == (rank == 0)


def test_context_parallel_buffers(tmp_path):
    spawn(tmp_path, 2, check_context_parallel)


# ---- micro-batches


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_micro_batches_with_sample_offset_equal_the_batch(dtype):
    ids, mask = batch()
    embedding = NEFTuneEmbedding(VOCAB, HIDDEN, dtype=dtype)
    accumulated = copy.deepcopy(embedding)
    whole = embedding(ids, attention_mask=mask, seed=5)
    for size in (1, 2, 3):
        parts = []
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            parts.append(
                accumulated(ids[rows], attention_mask=mask[rows], seed=5, sample_offset=start)
            )
            assert start == 0 or not torch.equal(
                accumulated(ids[rows][:1], attention_mask=torch.ones_like(mask[:1]), seed=5),
                whole[start],
            )
        assert torch.equal(torch.cat(parts), whole), size


# ---- generators out of step


def check_generators_out_of_step(rank, folder):
    """Dropout on shards of unlike size leaves the ranks' generators apart: the group's first rank
    draws for all.
    """
    mesh = init_device_mesh("cpu", (2,))
    ids, mask = batch()
    expected, _ = one_process()
    for by_hand in (False, True):
        model = Embedder(embedding=NEFTuneEmbedding, noise_alpha=5.0) if by_hand else Embedder()
        parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate())})
        if not by_hand:
            apply_neftune(model, 5.0, embedding="embed")
        torch.manual_seed(3)
        if rank == 1:
            torch.rand(5)
        out = model.embed(ids, attention_mask=mask) if by_hand else model(ids, attention_mask=mask)
        assert torch.equal(out, expected), by_hand


def test_generators_out_of_step(tmp_path):
    spawn(tmp_path, 2, check_generators_out_of_step)


# ---- trainers under torchrun


class Rows(torch.utils.data.Dataset):
    """Eight samples of unlike lengths."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(
            1, VOCAB, (3 + index % 5,), generator=torch.Generator().manual_seed(index)
        )
        return {"input_ids": ids, "labels": ids}


def padded(rows):
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(ids == 0, -100),
    }


def recorded_noise(embedding, seen):
    """Of every call of the embedding: ids, its output and the weight it came from."""

    def record(module, args, output):
        seen.append(
            (args[0], output.detach().clone(), module.weight.detach().clone(), module._neftune.last)
        )

    return embedding.register_forward_hook(record)


def assert_own_noise(seen, rank):
    """The rank's replica, one seed on all ranks, and so unlike noise."""
    assert seen
    for ids, out, weight, last in seen:
        expected = noisy_embedding(
            ids, weight, 5.0, attention_mask=(ids != 0).long(), seed=last.noise.seed, replica=rank
        )
        assert torch.equal(out, expected)
        other = noisy_embedding(
            ids,
            weight,
            5.0,
            attention_mask=(ids != 0).long(),
            seed=last.noise.seed,
            replica=1 - rank,
        )
        assert not torch.equal(out, other)
    first, second = gathered(seen[0][3].noise.seed)
    assert torch.equal(first, second), (
        "trainers seed all ranks alike: only the replica tells them apart"
    )


def check_trainer(rank, folder):
    import transformers

    from neftune_kernels.integrations.transformers import NEFTuneCallback

    model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/llama")
    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/out",
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        data_collator=padded,
        callbacks=[NEFTuneCallback(5.0)],
    )
    seen = []
    hook = recorded_noise(model.get_input_embeddings(), seen)
    trainer.train()
    hook.remove()
    assert dist.get_world_size() == 2 and len(seen) == 4
    assert_own_noise(seen, rank)
    assert module_replica(nn.Embedding(3, 2)) == rank, "Trainer makes a group of some ranks"
    assert type(model.get_input_embeddings()) is nn.Embedding
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save((losses, model.state_dict()), f"{folder}/result{os.environ['RUN']}-{rank}")


def check_accelerate(rank, folder):
    import accelerate
    import transformers

    accelerate.utils.set_seed(7)
    accelerator = accelerate.Accelerator(cpu=True)
    model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/llama").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, collate_fn=padded)
    embedding = model.get_input_embeddings()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    handle = apply_neftune(accelerator.unwrap_model(model), 5.0)
    seen = []
    hook = recorded_noise(embedding, seen)
    for inputs in loader:
        accelerator.backward(model(**inputs).loss)
        optimizer.step()
        optimizer.zero_grad()
    hook.remove()
    assert isinstance(model, nn.parallel.DistributedDataParallel) and len(seen) == 2
    assert_own_noise(seen, rank)
    assert module_replica(nn.Embedding(3, 2)) == rank, "accelerate makes a group of some ranks"
    handle.remove()
    torch.save(
        ([], accelerator.unwrap_model(model).state_dict()),
        f"{folder}/result{os.environ['RUN']}-{rank}",
    )


@pytest.mark.parametrize("check", [check_trainer, check_accelerate])
def test_trainers_under_torchrun(tmp_path, check):
    """Two launches with the same seed end in the same losses and weights, to the bit."""
    pytest.importorskip("transformers")
    make_llama().save_pretrained(tmp_path / "llama")
    for run in (0, 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(tmp_path, 2, check, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RUN=str(run))
    for rank in (0, 1):
        (losses, weights), (again, same) = (
            torch.load(tmp_path / f"result{run}-{rank}") for run in (0, 1)
        )
        assert losses == again and all(
            torch.equal(value, same[name]) for name, value in weights.items()
        )
