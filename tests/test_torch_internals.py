"""The private names of torch that neftune_kernels rests on are there and mean what they did."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from neftune_kernels import torch_internals

OPS = torch.ops.neftune_kernels


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_are_counted():
    assert torch_internals.dispatch_modes() == 0
    with Mode():
        assert torch_internals.dispatch_modes() == 1
        with torch._subclasses.FakeTensorMode():
            assert torch_internals.dispatch_modes() == 2
    assert torch_internals.dispatch_modes() == 0


def test_transforms_are_seen():
    seen = []

    def look(x):
        seen.append((torch_internals.transformed(), torch_internals.vmapped()))
        return x.sum()

    x = torch.ones(2)
    look(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x[None])
    with torch.autograd.forward_ad.dual_level():
        look(x)
    assert seen == [(False, False), (True, True), (True, True), (True, False)]


def test_backward_is_seen():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch_internals.backward_task()))
    x.sum().backward()
    after = torch_internals.backward_task()
    assert after == torch_internals.NO_BACKWARD and after not in seen and len(seen) == 1


def test_hooked_saved_tensors_are_seen():
    seen = []

    def look(x):
        seen.append(torch_internals.saved_tensors_hooks() is not None)
        return x.square()

    x = torch.ones(2, requires_grad=True)
    look(x)
    torch.utils.checkpoint.checkpoint(look, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        look(x)
    assert seen == [False, True, True] and torch_internals.saved_tensors_hooks() is None


def test_entry_is_the_operator_one_frame_sooner():
    overload = OPS.draw_seed.default
    entry = torch_internals.entry(overload)
    assert entry is not overload, "OpOverload has no _op any more: calls cost a frame more"
    torch.manual_seed(3)
    expected = overload(torch.empty((), dtype=torch.int64))
    torch.manual_seed(3)
    assert torch.equal(entry(torch.empty((), dtype=torch.int64)), expected)


def test_functions_are_asked_outside_the_graph():
    """Dynamo takes a marked function's value as a constant and does not look inside."""

    @torch_internals.asked_outside_the_graph
    def ask():
        return len(str(__import__("sys").modules))

    def graph(x):
        return x * 0 + ask()

    torch.compiler.reset()
    expected = ask()
    compiled = torch.compile(graph, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())).item() >= expected
    unmarked = torch.compiler.assume_constant_result(lambda: 1)
    assert unmarked._dynamo_marked_constant and ask._dynamo_marked_constant


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_groups_are_listed(one_process):
    assert torch_internals.ranks_of_groups() == [[0]]
    dist.new_group([0])
    assert torch_internals.ranks_of_groups() == [[0], [0]]


def test_a_slice_knows_its_root(one_process):
    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    assert torch_internals.root_mesh(mesh["tp"]) == mesh
    assert torch_internals.root_mesh(mesh) == mesh


def test_fsdp_tells_its_parameters_and_classes(one_process):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False))
    model[1].weight = model[0].weight
    fully_shard(model, mesh=mesh)
    (shared,) = torch_internals.sharded_parameters()
    assert set(shared.owners) == {model[0], model[1]}
    assert shared.mesh_info.mesh == mesh
    classes = torch_internals.fsdp_classes()
    assert classes[torch.nn.Sequential] is type(model) is not torch.nn.Sequential


def test_functions_are_applied_as_by_torch():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return factor * x

        @staticmethod
        def backward(ctx, grad):
            return ctx.factor * grad, None

    x = torch.ones(3, requires_grad=True)
    quick, usual = (one(x, 2.0) for one in (torch_internals.applied_quickly(Twice), Twice.apply))
    assert torch.equal(quick, usual) and type(quick.grad_fn) is type(usual.grad_fn)
    assert torch.equal(torch.autograd.grad(quick.sum(), x)[0], torch.full((3,), 2.0))
