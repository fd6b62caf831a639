"""Each of the 12 modalities on a small task of its own: its tokenizer and head learn around one frozen encoder.

The encoder has random weights and is the same for all. As a program
(`python tests/convergence/test_metatransformer.py`) this prints the accuracies on examples
that were not trained on; they are in models/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfuse.models import create
from mmfuse.models.metatransformer import MetaTransformer, fbank, laplacian_eigenvectors

pytest.importorskip("sklearn.datasets")
pytest.importorskip("skimage.data")

DIM, EXAMPLES, HELD_OUT, BATCH = 48, 600, 200, 32


class Task(NamedTuple):
    """`data` [N, ...] is what the tokenizer takes; graphs are a list, of which `batch` puts some together."""

    tokenizer: dict[str, Any]
    data: Any
    label: Tensor
    steps: int = 80
    batch: Callable[[Any, Tensor], Any] = lambda data, rows: data[rows]


def labels(classes: int) -> Tensor:
    return torch.arange(EXAMPLES) % classes


def text() -> Task:
    """Is the remark kind? "that film was not bad": negation turns a word round. Sentences by a small grammar."""
    words = "a an this that was is so very rather film book song meal not never good great nice fine bad dull poor sad"
    vocabulary = {word: i + 1 for i, word in enumerate(words.split())}
    draw = torch.Generator().manual_seed(0)
    pick = lambda *options: options[int(torch.randint(len(options), (), generator=draw))]  # noqa: E731
    ids, label = torch.zeros(EXAMPLES, 7, dtype=torch.int64), labels(2)
    for row, kind in zip(ids, label.tolist(), strict=True):
        turned = pick(0, 1)
        adjective = pick("good", "great", "nice", "fine") if kind != turned else pick("bad", "dull", "poor", "sad")
        negation = [pick("not", "never")] if turned else []
        sentence = [pick("this", "that"), pick("film", "book", "song", "meal"), pick("is", "was"), *negation]
        sentence += [*pick([], ["so"], ["very"], ["rather"]), adjective]
        row[: len(sentence)] = torch.tensor([vocabulary[word] for word in sentence])
    return Task({"vocab_size": len(vocabulary) + 1, "length": 7}, ids, label, 120)


def image() -> Task:
    """Which digit was written? scikit-learn's pictures."""
    from sklearn.datasets import load_digits

    pixels, label = (torch.from_numpy(t) for t in load_digits(return_X_y=True))
    pixels = (pixels.float() / 8 - 1).view(-1, 1, 8, 8)
    return Task({"img_size": 8, "patch_size": 4, "in_c": 1, "position": True}, pixels, label, 150)


def point_cloud() -> Task:
    """Which body are the points from? Samples of four meshes, turned about at random, with noise."""
    n, label = 64, labels(4)
    u, v = torch.rand(2, EXAMPLES, n)
    angle, height = 2 * math.pi * u, 2 * v - 1
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    sphere = torch.cat([ring * (1 - height**2).sqrt()[..., None], height[..., None]], -1)
    cylinder = torch.cat([ring * 0.6, height[..., None]], -1)
    tube = 2 * math.pi * v
    torus = torch.cat([ring * (0.8 + 0.25 * tube.cos())[..., None], 0.25 * tube.sin()[..., None]], -1)
    plate = torch.stack([2 * u - 1, height, torch.zeros_like(u)], -1)
    points = torch.stack([sphere, cylinder, torus, plate])[label, torch.arange(EXAMPLES)]
    turn = torch.linalg.qr(torch.randn(EXAMPLES, 3, 3)).Q
    points = points @ turn + 0.02 * torch.randn_like(points)
    options = {"sample_ratio": 0.25, "group_size": 12, "group": "knn", "feature_type": "dp", "channels": [24, 32, 48]}
    return Task(options, points, label, 120)


def audio() -> Task:
    """Which instrument? A fifth of a second of four wave forms at any pitch, through the log-mel filter bank."""
    rate, label = 8000, labels(4)
    pitch = 150 + 350 * torch.rand(EXAMPLES, 1)
    phase = pitch * torch.arange(rate // 5) / rate + torch.rand(EXAMPLES, 1)
    sine = (2 * math.pi * phase).sin()
    noise = torch.randn_like(phase)
    sound = torch.stack([sine, sine.sign(), 2 * (phase % 1) - 1, noise])[label, torch.arange(EXAMPLES)]
    spectrogram = fbank(sound + 0.05 * torch.randn_like(sound), rate, mels=32) / 8  # [N, 18, 32]
    options = {"frames": 18, "mels": 32, "patch_size": 8, "stride": 5, "position": True}
    return Task(options, spectrogram, label)


def video() -> Task:
    """Where does the digit go? Up, down, left or right; eight frames of 16 x 16 pixels."""
    from sklearn.datasets import load_digits

    picture = torch.from_numpy(load_digits().images).float()[:EXAMPLES] / 16
    label, clips = labels(4), torch.zeros(EXAMPLES, 1, 8, 16, 16)
    for i, (dy, dx) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
        for t in range(8):
            y, x = (4 + d * (t - 3) for d in (dy, dx))
            clips[label == i, 0, t, y : y + 8, x : x + 8] = picture[label == i]
    options = {"img_size": 16, "patch_size": 8, "in_chans": 1, "num_frames": 8, "tubelet_size": 2, "position": True}
    return Task(options, clips + 0.05 * torch.randn_like(clips), label)


def infrared() -> Task:
    """What is warm? Someone upright, someone lying, a round lamp or two of them, before a cool, uneven wall."""
    label = labels(4)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    where = 5 + 6 * torch.rand(EXAMPLES, 2, 1, 1)
    dy, dx = y - where[:, :1, 0], x - where[:, 1:, 0]
    tall, wide = torch.exp(-((dy / 5) ** 2) - dx**2), torch.exp(-(dy**2) - (dx / 5) ** 2)
    one = torch.exp(-(dy**2 + dx**2) / 6)
    two = torch.exp(-(dy**2 + (dx.abs() - 4) ** 2) / 3)
    warm = torch.stack([tall, wide, one, two])[label, torch.arange(EXAMPLES)]
    wall = F.interpolate(torch.randn(EXAMPLES, 1, 4, 4), size=16, mode="bilinear")[:, 0]
    pixels = warm + 0.2 * wall + 0.05 * torch.randn_like(warm)
    return Task({"img_size": 16, "patch_size": 4, "in_c": 1, "position": True}, pixels[:, None], label, 250)


def hyperspectral() -> Task:
    """What covers the ground? 30 bands of five materials, each with an absorption of its own, in changing light."""
    bands, label = torch.linspace(0, 1, 30), labels(5)
    centre = torch.linspace(0.2, 0.8, 5)[label, None, None, None] + 0.02 * torch.randn(EXAMPLES, 1, 1, 1)
    depth = 0.3 + 0.2 * torch.rand(EXAMPLES, 1, 1, 1)
    light = 0.6 + 0.4 * torch.rand(EXAMPLES, 1, 1, 1)
    cube = light * (0.4 + 0.3 * bands - depth * torch.exp(-(((bands - centre) / 0.06) ** 2)))
    cube = cube.expand(-1, 3, 3, -1) + 0.02 * torch.randn(EXAMPLES, 3, 3, 30)
    return Task({"bands": 30, "patch": 3, "near_band": 3}, 4 * cube - 2, label, 300)


def x_ray() -> Task:
    """Is there a nodule, and on which side? scikit-image's phantom of a head, cropped and lit at random."""
    from skimage.data import shepp_logan_phantom

    phantom = F.interpolate(torch.from_numpy(shepp_logan_phantom()).float()[None, None], size=(28, 28), mode="area")
    label, pixels = labels(3), torch.zeros(EXAMPLES, 1, 24, 24)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    for row, kind in zip(pixels, label.tolist(), strict=True):
        top, left = torch.randint(5, (2,)).tolist()
        row.copy_(phantom[0, :, top : top + 24, left : left + 24])
        if kind:
            cy, cx = 12 + 3 * torch.randn(()), (7 if kind == 1 else 17) + torch.randn(())
            row += 0.7 * torch.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 2)
    pixels = pixels * (0.7 + 0.6 * torch.rand(EXAMPLES, 1, 1, 1)) + 0.05 * torch.randn_like(pixels)
    return Task({"img_size": 24, "patch_size": 6, "in_c": 1, "position": True}, 2 * pixels - 0.5, label, 200)


def imu() -> Task:
    """Who wears it stands, walks, runs or turns? Three axes of acceleration, three of rotation."""
    t, label = torch.arange(32) / 16, labels(4)
    rate = torch.tensor([0.0, 1.8, 2.8, 0.5])[label, None] * (1 + 0.1 * torch.randn(EXAMPLES, 1))
    strength = torch.tensor([0.0, 0.5, 1.0, 0.1])[label, None] * (1 + 0.2 * torch.randn(EXAMPLES, 1))
    beat = 2 * math.pi * (rate * t + torch.rand(EXAMPLES, 1))
    step, swing = strength * beat.sin(), strength * beat.cos()
    yaw = (label == 3)[:, None] * (1 + 0.3 * torch.randn(EXAMPLES, 1)) * torch.ones_like(t)
    traces = torch.stack([0.3 * swing, 0.2 * step, 1 + step, 0.3 * step, 0.3 * swing, yaw], -1)
    return Task({"c_in": 6}, traces + 0.3 * torch.randn_like(traces), label, 200)


def tabular() -> Task:
    """Is the tumour benign? Nine measured columns of scikit-learn's table, and one cut into four categories."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    table, label = torch.from_numpy(data.data[:, :10]).float(), torch.from_numpy(data.target)
    radius = table[:, 0].contiguous()
    table[:, 0] = 1 + torch.bucketize(radius, radius.quantile(torch.tensor([0.25, 0.5, 0.75])))
    names = [name.replace(" ", "_") for name in data.feature_names[:10]]
    options = {
        "column_idx": {name: i for i, name in enumerate(names)},
        "cat_embed_input": [(names[0], 4)],
        "continuous_cols": names[1:],
        "cont_norm_layer": "batchnorm",
    }
    return Task(options, table, label, 150)


def graph() -> Task:
    """A path, a cycle or a star? Five to eight nodes in any order, told apart by Laplacian eigenvectors."""
    graphs, label = [], labels(3)
    for kind in label.tolist():
        n = int(torch.randint(5, 9, ()))
        node = torch.arange(n)
        ends = [
            torch.stack([node[:-1], node[1:]]),
            torch.stack([node, (node + 1) % n]),
            torch.stack([torch.zeros(n - 1, dtype=torch.int64), node[1:]]),
        ][kind]
        ends = torch.randperm(n)[torch.cat([ends, ends.flip(0)], 1)]
        graphs.append((n, ends, laplacian_eigenvectors(ends, n)[:, :5]))
    options = {"num_atoms": 2, "num_edges": 2, "lap_node_id": True, "lap_node_id_k": 5, "type_id": True}
    options |= {"lap_node_id_sign_flip": True}
    return Task(options, graphs, label, 150, batch_of_graphs)


def batch_of_graphs(graphs: list[tuple[int, Tensor, Tensor]], rows: Tensor) -> dict[str, Any]:
    nodes, ends, eigenvectors = zip(*(graphs[i] for i in rows.tolist()), strict=True)
    edges = [e.shape[1] for e in ends]
    return {
        "node_num": list(nodes),
        "edge_num": edges,
        "node_data": torch.ones(sum(nodes), 1, dtype=torch.int64),
        "edge_data": torch.ones(sum(edges), 1, dtype=torch.int64),
        "edge_index": torch.cat(ends, 1),
        "lap_eigvec": torch.cat(eigenvectors),
    }


def time_series() -> Task:
    """What is it? A trend, a fast wave, a slow wave or a random walk; 36 noisy steps."""
    t, label = torch.arange(36.0), labels(4)
    phase = 2 * math.pi * torch.rand(EXAMPLES, 1)
    slope = torch.randn(EXAMPLES, 1).sign() * (0.5 + torch.rand(EXAMPLES, 1))
    walk = torch.randn(EXAMPLES, 36).cumsum(1)
    kinds = [slope * (t / 18 - 1), (2 * math.pi * t / 6 + phase).sin(), (2 * math.pi * t / 18 + phase).sin(), walk / 3]
    series = torch.stack(kinds)[label, torch.arange(EXAMPLES)] + 0.2 * torch.randn(EXAMPLES, 36)
    return Task({"c_in": 1}, series[..., None], label, 150)


TASKS: dict[str, Callable[[], Task]] = {
    "text": text,
    "image": image,
    "point-cloud": point_cloud,
    "audio": audio,
    "video": video,
    "infrared": infrared,
    "hyperspectral": hyperspectral,
    "x-ray": x_ray,
    "imu": imu,
    "tabular": tabular,
    "graph": graph,
    "time-series": time_series,
}


def learn(modality: str) -> tuple[MetaTransformer, float, float]:
    """(model, accuracy on held-out examples, chance: the share of their commonest class)."""
    torch.manual_seed(0)
    task = TASKS[modality]()
    classes = int(task.label.max()) + 1
    component = {"modality": modality, "num_classes": classes, "tokenizer": task.tokenizer}
    torch.manual_seed(1)
    model = create(
        "metatransformer",
        {"encoder": {"dim": DIM, "depth": 2, "num_heads": 4, "mlp_ratio": 2}, "components": {"task": component}},
    )
    for weight in (p for p in model.encoder.parameters() if p.dim() > 1):
        weight.data.mul_(5)  # the official deviation of 0.02 is for a width of 768
    order = torch.randperm(len(task.label))
    held_out, seen = order[:HELD_OUT], order[HELD_OUT:]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=task.steps)
    for _ in range(task.steps):
        rows = seen[torch.randint(len(seen), (BATCH,))]
        loss = F.cross_entropy(model("task", task.batch(task.data, rows)), task.label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        predicted = model.eval()("task", task.batch(task.data, held_out)).argmax(1)
    right = task.label[held_out]
    return model, (predicted == right).double().mean().item(), (right.bincount().max() / len(right)).item()


@pytest.mark.parametrize("modality", TASKS)
def test_a_head_on_the_frozen_encoder_beats_chance(modality: str) -> None:
    model, accuracy, chance = learn(modality)
    assert all(p.grad is None for p in model.encoder.parameters())
    assert accuracy > chance + 0.5 * (1 - chance)


def main() -> None:
    for modality, task in TASKS.items():
        _, accuracy, chance = learn(modality)
        print(f"| {modality} | {task.__doc__} | {chance:.2f} | {accuracy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
