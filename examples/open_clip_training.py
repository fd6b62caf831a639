"""An open_clip training loop before and after one line, after which the model takes bytes in place of floats."""

import torch
from sklearn.datasets import load_digits

import mmfuse
from mmfuse._compat import allow_torchvision

allow_torchvision()  # open_clip imports torchvision, which may have no build for a CPU-only torch
import open_clip  # noqa: E402

digits = load_digits()
pixels = torch.from_numpy(digits.images * 15).byte()[:, None].expand(-1, 3, -1, -1)  # uint8 [1797, 3, 8, 8]
labels = torch.from_numpy(digits.target)
texts = open_clip.tokenize([f"the number {digit}" for digit in range(10)], context_length=5)
batches = torch.stack([(labels[:1500] == digit).nonzero()[:140, 0] for digit in range(10)], dim=1)  # [140, 10]


def train(accelerated: bool) -> tuple[float, float]:
    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 4, "width": 64, "layers": 2, "head_width": 32}
    model = open_clip.CLIP(64, vision, {"context_length": 5, "width": 64, "heads": 2, "layers": 1})
    loss_of = open_clip.ClipLoss()
    images = pixels if accelerated else (pixels / 255 - 0.5) / 0.5
    if accelerated:
        print(mmfuse.accelerate(torch.nn.ModuleList([model, loss_of]), uint8=([0.5] * 3, [0.5] * 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches:
        loss = loss_of(*model(images[batch], texts))  # of ten pairs only, which it leaves to eager
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, text, _ = model.eval()(images[1500:], texts)
    return loss.item(), (image @ text.T).argmax(1).eq(labels[1500:]).double().mean().item()


print("before: last loss {:.3f}, accuracy on new digits {:.2f}".format(*train(accelerated=False)))
print("after: last loss {:.3f}, accuracy on new digits {:.2f}".format(*train(accelerated=True)))
