import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cifar10
from benchmarks.lenet5 import FloatStep, LeNet5, accuracy, train_float
from benchmarks.make_mnist import read_idx, read_sources, write_npz
from benchmarks.mnist import MNIST_FILE, Batches, load_mnist, recorded_checksums, sha256
from benchmarks.resnet20 import ResNet20, load_resnet20


def test_mnist_is_the_original() -> None:
    data = load_mnist()
    assert sha256(MNIST_FILE) == recorded_checksums()["mnist.npz"]
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    # Mean of the training images as published with the usual normalisation.
    assert data.train_images.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert (data.train_images.min().item(), data.train_images.max().item()) == (0, 1)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def test_damaged_mnist_is_refused(tmp_path: Path) -> None:
    content = bytearray(MNIST_FILE.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "mnist.npz"
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_mnist(path=damaged)


def test_idx_becomes_the_same_npz_twice(tmp_path: Path) -> None:
    idx = tmp_path / "images.gz"
    # Header: zero, zero, uint8, 2 dimensions; 2 rows of 3.
    idx.write_bytes(gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)])))
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, {"images": read_idx(idx)})
    assert np.load(tmp_path / "a.npz")["images"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert sha256(tmp_path / "a.npz") == sha256(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (bytes([0, 0, 9, 1, 0, 0, 0, 1, 0]), "not an idx file of unsigned bytes"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 2, 0]), "holds 1 values"),
    ],
)
def test_broken_idx_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    idx = tmp_path / "images.gz"
    idx.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        read_idx(idx)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ValueError, match="not the original"):
        read_sources(tmp_path, recorded_checksums())


def numbered_batches(shuffle: bool, seed: int = 0) -> Batches:
    return Batches(torch.arange(10), torch.arange(10) + 100, 4, shuffle=shuffle, seed=seed)


def epoch(batches: Batches) -> list[int]:
    return torch.cat([images for images, _ in batches]).tolist()


def test_batches_in_order_keep_the_smaller_last_one() -> None:
    batches = numbered_batches(shuffle=False)
    assert len(batches) == 3
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert epoch(batches) == epoch(batches) == list(range(10))


def test_each_epoch_is_a_new_permutation() -> None:
    batches = numbered_batches(shuffle=True)
    first, second = epoch(batches), epoch(batches)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(10))


def test_epochs_depend_on_the_seed_alone() -> None:
    first, again, other = (numbered_batches(shuffle=True, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(0)
    expected = [epoch(first), epoch(first)]
    assert [epoch(again), epoch(again)] == expected
    assert [epoch(other), epoch(other)] != expected


def test_labels_follow_their_images() -> None:
    for images, labels in numbered_batches(shuffle=True):
        assert torch.equal(images + 100, labels)


@pytest.mark.parametrize(
    ("labels", "batch_size", "message"), [(3, 1, "2 images, but 3"), (2, 0, "at least 1")]
)
def test_bad_batches_are_refused(labels: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(torch.zeros(2), torch.zeros(labels), batch_size)


def flops(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops())


def test_lenet5_macs() -> None:
    # output height * width * channels * input channels * kernel height * width:
    #   conv1  24 * 24 * 32 *  1 * 5 * 5 =   460,800
    #   conv2   8 *  8 * 64 * 32 * 5 * 5 = 3,276,800
    # inputs * outputs:
    #   fc1                   1024 * 512 =   524,288
    #   fc2                     512 * 10 =     5,120
    assert flops(LeNet5(), torch.zeros(1, 1, 28, 28)) / 2 == 4_267_008


def test_resnet20_macs() -> None:
    # conv1                        32 * 32 * 16 *  3 * 9 =    442,368
    # layer1   6 convolutions of   32 * 32 * 16 * 16 * 9 = 14,155,776
    # layer2   first, stride 2     16 * 16 * 32 * 16 * 9 =  1,179,648
    #          5 convolutions of   16 * 16 * 32 * 32 * 9 = 11,796,480
    # layer3   first, stride 2       8 * 8 * 64 * 32 * 9 =  1,179,648
    #          5 convolutions of     8 * 8 * 64 * 64 * 9 = 11,796,480
    # linear                                     64 * 10 =        640
    assert flops(ResNet20().eval(), torch.zeros(1, 3, 32, 32)) / 2 == 40_551_040


def test_float_training_learns_and_reports_each_step() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 2
    images = labels.float().view(-1, 1, 1, 1) * torch.ones(1, 1, 28, 28)
    train = Batches(images, labels, 24, shuffle=True)
    model, steps = LeNet5(), list[FloatStep]()
    train_float(model, train, epochs=4, on_step=steps.append)
    assert [(step.epoch, step.step) for step in steps] == [
        (e, s) for e in (1, 2, 3, 4) for s in (1, 2, 3)
    ]
    assert steps[-1].loss < steps[0].loss / 2
    assert not model.training
    assert accuracy(model, train) == 1


def test_accuracy_weighs_samples_not_batches() -> None:
    logits = torch.eye(3)
    # Right, right | wrong: 2 of 3, while the mean over the batches would be 1 of 2.
    batches = Batches(logits, torch.tensor([0, 1, 0]), 2)
    assert accuracy(nn.Identity(), batches) == pytest.approx(2 / 3)


def test_resnet20_weights_round_trip(tmp_path: Path) -> None:
    model = ResNet20().eval()
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 32, 32)
    loaded = load_resnet20(tmp_path / "weights.safetensors")
    assert torch.equal(loaded(images), model(images))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"conv9.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"not a ResNet-20: missing .*conv1.*unknown.*conv9"):
        load_resnet20(tmp_path / "weights.safetensors")


def jpeg(red: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (red, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def test_cifar10_archive_is_decoded(tmp_path: Path) -> None:
    files = [jpeg(0), jpeg(255)]
    arrays: dict[str, np.ndarray[tuple[int], np.dtype[np.generic]]] = {}
    for split in ("train", "test"):
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{split}_offsets"] = np.array([0, len(files[0]), len(files[0] + files[1])])
        arrays[f"{split}_labels"] = np.array([3, 7], dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", allow_pickle=False, **arrays)
    data = cifar10.load_cifar10(tmp_path / "cifar10.npz")
    assert data.train_images.shape == (2, 3, 32, 32)
    assert data.train_images[:, 0, 16, 16].tolist() == pytest.approx([0, 255], abs=2)
    ((images, labels),) = cifar10.test_batches(data, 2)
    # Red: (0 - 0.485) / 0.229 = -2.118, (1 - 0.485) / 0.229 = 2.249.
    assert images[:, 0, 16, 16].tolist() == pytest.approx([-2.118, 2.249], abs=0.04)
    assert labels.tolist() == [3, 7]


def test_crop_and_flip_gives_shifted_or_mirrored_copies() -> None:
    image = torch.arange(1, 3 * 8 * 8 + 1, dtype=torch.uint8).view(1, 3, 8, 8)
    padded = nn.functional.pad(image, (1, 1, 1, 1))
    windows = [padded[0, :, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
    expected = {tuple(w.flatten().tolist()) for v in windows for w in (v, v.flip(2))}
    augmented = cifar10.CropAndFlip(padding=1)(image.expand(400, -1, -1, -1))
    assert augmented.dtype == torch.uint8
    assert {tuple(sample.flatten().tolist()) for sample in augmented} == expected


def test_crop_and_flip_depends_on_its_seed_alone() -> None:
    images = torch.rand(16, 3, 32, 32)
    first, again = cifar10.CropAndFlip(seed=3), cifar10.CropAndFlip(seed=3)
    augmented = first(images)
    assert torch.equal(augmented, again(images))
    assert not torch.equal(augmented, first(images))
