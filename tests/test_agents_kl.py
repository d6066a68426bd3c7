"""KL estimators and the controller of the penalty's weight."""

import numpy as np
import pytest

from agents.kl import KLController, kl_estimates


def test_estimators_by_hand() -> None:
    found = kl_estimates(np.log(np.array([2.0, 0.5])))
    np.testing.assert_allclose(found["k1"], [0.693147, -0.693147], atol=1e-6)
    np.testing.assert_allclose(found["k2"], [0.240227, 0.240227], atol=1e-6)
    np.testing.assert_allclose(found["k3"], [0.5 - 1 + 0.693147, 2 - 1 - 0.693147], atol=1e-6)


def test_k1_and_k3_have_the_exact_kl_as_their_mean() -> None:
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = float((p * np.log(p / q)).sum())
    drawn = rng.choice(3, size=200_000, p=p)
    found = kl_estimates(np.log(p / q)[drawn])
    for name in ("k1", "k3"):
        assert found[name].mean() == pytest.approx(exact, abs=0.01)
    assert (found["k3"] >= 0).all()


def test_the_adaptive_weight_by_hand() -> None:
    kl = KLController(0.1, target=6.0, horizon=1000)
    kl.update(6.6, 50)  # 10 % above
    assert kl.coef == pytest.approx(0.1 * (1 + 0.1 * 50 / 1000))
    kl = KLController(0.1, target=6.0, horizon=1000)
    kl.update(60.0, 50)  # the error is clipped to 20 %
    assert kl.coef == pytest.approx(0.1 * (1 + 0.2 * 50 / 1000))
    kl = KLController(0.1)
    kl.update(60.0, 50)
    assert kl.coef == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coef": -0.1}, "kl_coef >= 0"),
        ({"coef": 0.0, "target": 6.0}, "a weight of 0 stays 0"),
        ({"coef": 0.1, "target": 0.0}, "target_ref_kl > 0"),
        ({"coef": 0.1, "horizon": 0.0}, "kl_horizon > 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLController(**arguments)
