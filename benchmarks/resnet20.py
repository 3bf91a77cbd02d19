"""ResNet-20 for 32x32 images (He et al., 2016, section 4.2) and a loader of its weights."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A).

    Where the shape changes, the shortcut takes every second row and column and pads the channels
    with zeros, half of them on either side.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self._stride = stride
        self._padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in, H, W) to (N, out, H / stride, W / stride)."""
        y: Tensor = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        return (y + self._shortcut(x)).relu()

    def _shortcut(self, x: Tensor) -> Tensor:
        if self._stride == 1:
            return x
        strided = x[:, :, :: self._stride, :: self._stride]
        return F.pad(strided, (0, 0, 0, 0, self._padding, self._padding))


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride),
        BasicBlock(out_channels, out_channels, 1),
        BasicBlock(out_channels, out_channels, 1),
    )


class ResNet20(nn.Module):
    """ResNet-20 with 16, 32 and 64 channels for normalised images of shape (N, 3, 32, 32).

    40,551,040 MACs per image.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits of shape (N, classes)."""
        x = self.bn1(self.conv1(images)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def load_resnet20(path: Path) -> ResNet20:
    """Loads weights from a safetensors file with the names of `ResNet20.state_dict()`.

    The counters `num_batches_tracked` of batch norm may be missing.

    Raises:
        ValueError: Any other entry is missing or unknown.
    """
    model = ResNet20()
    missing, unknown = model.load_state_dict(load_file(path), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        raise ValueError(f"{path} is not a ResNet-20: missing {missing}, unknown {unknown}")
    return model.eval()
