"""A timm classifier that is trained and run on the bytes of images: no normalised float copy of them is made.

Which of four scikit-image photographs is a tile of 32 x 32 pixels from? The right half of each is kept for the test.
"""

import skimage
import torch

import mmfuse
from mmfuse._compat import allow_torchvision

allow_torchvision()  # timm imports torchvision, which may have no build for a CPU-only torch
from timm.models import VisionTransformer  # noqa: E402

torch.manual_seed(0)
photographs = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
left, right = [], []  # (bytes [tiles, 3, 32, 32], label)
for label, photograph in enumerate(photographs):
    tiles = torch.from_numpy(photograph).unfold(0, 32, 16).unfold(1, 32, 16)  # [rows, columns, 3, 32, 32]
    middle = tiles.shape[1] // 2
    left += [(tile, label) for tile in tiles[:, : middle - 1].flatten(0, 1)]
    right += [(tile, label) for tile in tiles[:, middle + 1 :].flatten(0, 1)]

mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=4)
print(report := mmfuse.accelerate(model, uint8=(mean, std)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for images, labels in torch.utils.data.DataLoader(left, batch_size=16, shuffle=True):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

images, labels = torch.utils.data.default_collate(right)
with torch.no_grad(), report:
    from_bytes = model.eval()(images)
with torch.no_grad():  # the report's block is over: this is timm again
    from_floats = model((images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
print(f"accuracy {from_bytes.argmax(1).eq(labels).double().mean():.2f}")
print(f"largest difference from timm on floats {(from_bytes - from_floats).abs().max():.1e}")
