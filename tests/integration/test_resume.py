"""Training that is cut off in mid-epoch goes on bit-identically, in the same process or a fresh one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from feature_models import ESTIMATORS, loss_of, make_data, make_model, make_optimizer, state_of

SCALED = [*((name, False) for name in ESTIMATORS), ("running", True)]


def order(epoch):
    return torch.randperm(70, generator=torch.Generator().manual_seed(epoch)).split(16)


def train(model, optimizer, position, num_steps):
    """Train from a position (epoch, batch) on; return losses and the position after that."""
    data, losses = make_data(70, seed=5), []
    epoch, batch = position
    for _ in range(num_steps):
        rows = order(epoch)[batch]
        loss = loss_of(model.train(), *(part[rows] for part in data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        epoch, batch = (epoch, batch + 1) if batch + 1 < 5 else (epoch + 1, 0)
    return losses, (epoch, batch)


def save(path, model, optimizer, position):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "position": position}, path)


def load(path, estimator, scale):
    saved = torch.load(path, weights_only=True)
    model = make_model(estimator, scale=scale)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = make_optimizer(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer, saved["position"]


@pytest.mark.parametrize(("estimator", "scale"), SCALED)
@pytest.mark.parametrize("cut", [1, 7])
def test_fresh_objects_go_on_bit_identically(estimator, scale, cut, tmp_path):
    model = make_model(estimator, scale=scale)
    optimizer = make_optimizer(model)
    _, position = train(model, optimizer, (0, 0), cut)
    save(tmp_path / "checkpoint.pt", model, optimizer, position)
    expected, _ = train(model, optimizer, position, 8)
    other, optimizer, position = load(tmp_path / "checkpoint.pt", estimator, scale)
    losses, _ = train(other, optimizer, position, 8)
    assert losses == expected
    for name, value in state_of(model).items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_fresh_process_goes_on_bit_identically(tmp_path):
    expected = []
    for index, (estimator, scale) in enumerate(SCALED):
        model = make_model(estimator, scale=scale)
        optimizer = make_optimizer(model)
        _, position = train(model, optimizer, (0, 0), 7)
        save(tmp_path / f"{index}.pt", model, optimizer, position)
        expected.append([loss.hex() for loss in train(model, optimizer, position, 5)[0]])
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "import test_resume as t\n"
        "t.torch.set_num_threads(int(sys.argv[2]))\n"
        "for index, case in enumerate(t.SCALED):\n"
        "    losses, _ = t.train(*t.load(f'{sys.argv[1]}/{index}.pt', *case), 5)\n"
        "    print(*(loss.hex() for loss in losses))\n"
    )
    here = str(Path(__file__).parent)
    # With another number of threads sums are added in another order.
    command = [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads()), here]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()] == expected


@pytest.mark.parametrize("estimator", ["running", "recursive"])
def test_without_the_state_the_losses_would_be_others(estimator):
    """What the tests above would not see if the state did not matter."""
    model = make_model(estimator)
    optimizer = make_optimizer(model)
    _, position = train(model, optimizer, (0, 0), 7)
    twin = make_model(estimator)
    weights = {name: value for name, value in model.state_dict().items() if "estimator" not in name}
    twin.load_state_dict(weights, strict=False)
    other = make_optimizer(twin)
    other.load_state_dict(optimizer.state_dict())
    assert train(twin, other, position, 3)[0] != train(model, optimizer, position, 3)[0]
