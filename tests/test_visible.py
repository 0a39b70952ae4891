"""What a user sees: repr() of a handle, print() of a model, copies that nobody steers, models that
are none.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from neftune_kernels import add_noise, apply_neftune

IDS = torch.tensor([[1, 2, 3], [4, 5, 0]])
MASK = IDS != 0


class Scaled(nn.Embedding):
    """Its noise is added behind it."""

    def forward(self, input):
        return super().forward(input) * 1.0


class Model(nn.Module):
    def __init__(self, kind=nn.Embedding):
        super().__init__()
        self.embed = kind(8, 4)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        return self.embed(input_ids)


@pytest.mark.parametrize(("kind", "how"), [(nn.Embedding, "fused"), (Scaled, "behind")])
def test_repr_of_a_handle(kind, how):
    model = Model(kind).train()
    handle = apply_neftune(model, 5.0, replica=3, backend="reference")
    told = f"alpha 5, replica 3, backend reference, {how}, on"
    assert repr(handle) == f"NEFTuneHandle(noise_alpha=5\n  embed: {told})"
    handle.noise_alpha = 2.5
    model.eval()
    assert f"alpha 2.5, replica 3, backend reference, {how}, off" in repr(handle)
    handle.remove()
    assert repr(handle) == "NEFTuneHandle(removed)"


def test_print_of_a_model():
    model, behind = Model().train(), Model(Scaled).train()
    plain = repr(model), repr(behind)
    handles = [apply_neftune(one, 5.0, replica=0, backend="reference") for one in (model, behind)]
    told = "(embed): Embedding(8, 4, noise: alpha 5, replica 0, backend reference, fused, on)"
    assert told in repr(model)
    assert repr(behind) == plain[1], "a site behind prints as its package wrote it"
    for handle in handles:
        handle.remove()
    assert (repr(model), repr(behind)) == plain


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_says_that_nobody_steers_it(kind, copied):
    model = Model(kind).train()
    handle = apply_neftune(model, 5.0)
    twin = copied(model)
    twin.eval()(IDS, MASK)  # no noise, no word
    with pytest.warns(UserWarning, match=r"was copied or unpickled .* apply_neftune\(copy\)"):
        twin.train()(IDS, MASK)
    taken = apply_neftune(twin, 2.0)
    assert taken is not handle and handle.noise_alpha == 5.0
    torch.manual_seed(0)
    out = twin(IDS, MASK)
    torch.manual_seed(0)
    clean = nn.functional.embedding(IDS, twin.embed.weight)
    assert torch.equal(out, add_noise(clean, 2.0, attention_mask=MASK))
    taken.remove()
    assert type(twin.embed) is kind and torch.equal(twin(IDS, MASK), clean)
    assert not twin._forward_pre_hooks and not twin.embed._forward_hooks
    handle.remove()


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"wants a model \(a torch.nn.Module\), got str 'gpt2'"):
        apply_neftune("gpt2")

    class Wrapper(nn.Module):  # as DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Model()
    with pytest.raises(ValueError, match=r"Wrapper .* apply_neftune\(model.module\)"):
        apply_neftune(Wrapper(model))
    apply_neftune(Wrapper(model).module).remove()


def test_a_handle_stays_with_its_model():
    """It steers this model, whoever holds it, and no other process's."""
    model = Model()
    handle = apply_neftune(model, 5.0)
    remedy = r"take its copy over with handle = apply_neftune\(copy\)"
    with pytest.raises(TypeError, match=remedy):
        pickle.dumps({"handle": handle})
    assert copy.copy(handle) is handle
    assert copy.deepcopy({"handle": handle})["handle"] is handle
    with pytest.raises(TypeError, match=r"call handle.remove\(\) before"):
        torch.jit.script(model)
