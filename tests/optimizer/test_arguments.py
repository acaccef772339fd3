"""What BLUR refuses at construction, with the remedy; what it shows of itself."""

import pytest
import torch
from torch import nn

from blur_optim import BLUR


def params():
    return [nn.Parameter(torch.zeros(3))]


INVALID = [
    ("negative gamma", {"gamma": -1.0}, ValueError, r"`gamma` must be finite and >= 0, got -1.0"),
    ("gamma is nan", {"gamma": float("nan")}, ValueError, r"`gamma` must be finite and >= 0, got nan"),
    ("infinite retain_weight", {"retain_weight": float("inf")}, ValueError, r"`retain_weight` must be finite"),
    ("unknown rule", {"rule": "pcgrad"}, ValueError, r"`rule` must be one of .*'blur'.*, got 'pcgrad'"),
    ("unknown scope", {"scope": "layer"}, ValueError, r"`scope` must be one of .*'parameter'.*, got 'layer'"),
    ("unknown stash", {"stash": "disk"}, ValueError, r"`stash` must be one of .*, 'reference'\], got 'disk'"),
    ("unknown backend", {"backend": "mps"}, ValueError, r"`backend` must be one of .*'foreach'.*, got 'mps'"),
    (
        "clipping to zero",
        {"max_grad_norm": 0.0},
        ValueError,
        r"`max_grad_norm` must be a positive number or None, got 0.0",
    ),
    ("clipping to a string", {"max_grad_norm": "1"}, ValueError, r"`max_grad_norm` must be a positive number or None"),
    ("gamma is None", {"gamma": None}, TypeError, r"`gamma` must be a number, got None"),
    ("gamma is a string", {"gamma": "1"}, TypeError, r"`gamma` must be a number, got '1'"),
    ("rule in a list", {"rule": ["blur"]}, ValueError, r"`rule` must be one of .*, got \['blur'\]"),
    ("the paper's alpha", {"alpha": 1.0}, TypeError, r"'alpha'. The paper's alpha is called `retain_weight` here"),
    ("base is a string", {"base": "adamw"}, TypeError, r"`base` must be an optimizer class.*got 'adamw'"),
    ("base makes a module", {"base": lambda p: nn.Linear(1, 1)}, TypeError, r"must make a torch.optim.Optimizer"),
    ("base is LBFGS", {"base": torch.optim.LBFGS}, TypeError, r"without a closure of its own, which LBFGS needs"),
    ("base is BLUR", {"base": BLUR}, ValueError, r"hyperparameters called \['gamma', 'retain_weight'\], got BLUR"),
    ("argument of no one", {"momentun": 0.9}, TypeError, r"momentun"),
]


@pytest.mark.parametrize(("options", "error", "message"), [c[1:] for c in INVALID], ids=[c[0] for c in INVALID])
def test_invalid_options(options, error, message):
    with pytest.raises(error, match=message):
        BLUR(params(), **options)


def test_no_params_and_no_instance():
    with pytest.raises(TypeError, match=r"`params` must be given, unless `base` is an optimizer instance"):
        BLUR(base=torch.optim.SGD)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (nn.Linear(1, 1), r"`params` must be parameters, got a module. Pass model.parameters\(\)"),
        (torch.optim.SGD(params()), r"`params` must be parameters, got the optimizer SGD. Pass base=... alone"),
    ],
    ids=["module", "optimizer"],
)
def test_what_is_no_parameters(wrong, message):
    with pytest.raises(TypeError, match=message):
        BLUR(wrong)


def test_weights_are_checked_in_each_step():
    (p,) = params()
    opt = BLUR([p], torch.optim.SGD, lr=1.0)
    opt.param_groups[0]["gamma"] = -1.0
    with pytest.raises(ValueError, match=r"`gamma` must be finite and >= 0, got -1.0"):
        opt.step(lambda: p.sum(), lambda: p.sum())
    assert torch.equal(p, torch.zeros(3))
    assert p.grad is None


def test_weights_of_a_group_are_checked():
    with pytest.raises(ValueError, match=r"`gamma` must be finite and >= 0, got -2"):
        BLUR([{"params": params(), "gamma": -2}])
    opt = BLUR(params())
    with pytest.raises(ValueError, match=r"`retain_weight` must be finite and >= 0, got -2"):
        opt.add_param_group({"params": params(), "retain_weight": -2})
    assert len(opt.param_groups) == 1


def test_an_invalid_option_leaves_an_instance_as_it_was():
    base = torch.optim.SGD(params(), lr=0.1)
    keys = set(base.defaults), set(base.param_groups[0])
    with pytest.raises(ValueError, match=r"`rule`"):
        BLUR(base=base, rule="pcgrad")
    assert (set(base.defaults), set(base.param_groups[0])) == keys


def test_repr_names_rule_and_base():
    text = repr(BLUR(params(), torch.optim.SGD, lr=0.1, gamma=0.25, rule="barrier"))
    assert "barrier" in text
    assert "SGD" in text
    assert "gamma: 0.25" in text


def test_methods_of_the_base_are_at_hand():
    class Switchable(torch.optim.SGD):
        def eval(self):
            return "evaluating"

    opt = BLUR(params(), Switchable, lr=0.1)
    assert opt.eval() == "evaluating"
    with pytest.raises(AttributeError, match=r"train"):
        _ = opt.train


class TestConfigure:
    def test_what_is_configured_holds_from_the_next_step(self):
        (p,) = made = params()
        opt = BLUR(made, torch.optim.SGD, lr=1.0, gamma=1.0)
        opt.configure(rule="weighted_sum", stash="int8")
        opt.step(lambda: p.sum(), lambda: 2 * p.sum())
        torch.testing.assert_close(p.detach(), torch.full((3,), -3.0))  # BLUR would have stepped by 1.
        assert opt.stash == "int8"

    @pytest.mark.parametrize("wrong", [{"rule": "pcgrad"}, {"stash": "disk"}, {"backend": "mps"}], ids=str)
    def test_one_wrong_value_and_nothing_changes(self, wrong):
        opt = BLUR(params(), torch.optim.SGD, lr=1.0)
        with pytest.raises(ValueError, match="must be one of"):
            opt.configure(**{"scope": "group", "normalize": True} | wrong)
        assert (opt.rule, opt.scope, opt.normalize, opt.stash, opt.backend) == (
            "blur",
            "global",
            False,
            "reference",
            None,
        )

    def test_weights_are_not_taken(self):
        with pytest.raises(TypeError, match=r"`configure` takes rule, .* got \['gamma'\]"):
            BLUR(params(), torch.optim.SGD, lr=1.0).configure(gamma=2.0)

    def test_steps_that_were_skipped_stay_counted(self):
        (p,) = made = params()
        opt = BLUR(made, torch.optim.SGD, lr=1.0)
        opt.step(lambda: p.sum() * float("inf"), lambda: p.sum())
        opt.configure(rule="weighted_sum")
        opt.step(lambda: p.sum() * float("inf"), lambda: p.sum())
        assert int(opt.statistics.skipped) == 2
