"""VGG-7 as the quantization literature has it, for 32x32 images."""

from itertools import pairwise

from torch import Tensor, nn

_CHANNELS = (3, 128, 128, 256, 256, 512, 512)


class VGG7(nn.Module):
    """2x128C3 - MP - 2x256C3 - MP - 2x512C3 - MP - 1024FC - 10 for images of shape (N, 3, 32, 32).

    Every convolution has a padding of 1 and is followed by batch norm and ReLU, so is the first
    linear layer. 615,917,568 MACs per image: 3,538,944 + 150,994,944 + 75,497,472 + 150,994,944 +
    75,497,472 + 150,994,944 in the convolutions, 8,388,608 + 10,240 in the linear layers.

    Args:
        width: Factor on the number of channels; other than 1 for quick trials.
        classes: Number of classes.
    """

    def __init__(self, width: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        channels = (3, *(round(width * c) for c in _CHANNELS[1:]))
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(channels)):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
            if index % 2:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = round(width * 1024)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels[-1] * 4 * 4, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits of shape (N, classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
