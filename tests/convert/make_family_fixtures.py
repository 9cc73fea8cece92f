"""Makes tests/convert/families: tiny random models of the real classes.

Run by hand in an environment with torch, timm and transformers (2.15, 1.0.31
and 5.23 made those in the repository):

  python tests/convert/make_family_fixtures.py tests/convert/families

The file of a model has the weights as published files name them under `w/`, the
same under the names of the class's own state_dict() under `module/` where they
differ, `images` [B, 3, H, W], and what the class makes of them: `image` [B, D]
and `tokens` [B, N, D]. Weights lie on a coarse grid so that they compress.
`bias_tables.npz` has a `table` [7 * 7, heads] and what it is for other sides.
"""

import functools
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.torch
import timm
import timm.models.deit
import timm.models.eva
import timm.models.resnet
import timm.models.swin_transformer
import timm.models.vision_transformer
import torch
import transformers


def randomise(model, seed=0):
  """Gives every parameter and statistic a value that matters."""
  generator = torch.Generator().manual_seed(seed)
  for name, x in model.state_dict().items():
    if not x.is_floating_point():
      continue
    noise = torch.randn(x.shape, generator=generator)
    scale = 0.3
    if x.ndim in (2, 4) and 'table' not in name:
      scale = 0.7 * x[0].numel() ** -0.5
    noise *= scale
    if 'running_var' in name:
      noise = 1 + noise.abs()
    elif x.ndim == 1 and name.endswith(('weight', 'gamma', 'lambda1')):
      noise += 1
    elif x.ndim == 1 and 'gamma_' in name:
      noise += 1
    x.copy_(torch.round(noise * 64) / 64)
  return model.eval()


def images(px):
  """A batch of images on the grid."""
  generator = torch.Generator().manual_seed(1)
  x = torch.randn((2, 3, px, px), generator=generator)
  return torch.round(x * 16) / 16


def published(model):
  """The state dict as the library writes it into a file."""
  if not isinstance(model, transformers.PreTrainedModel):
    return model.state_dict()
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    return safetensors.torch.load_file(f'{folder}/model.safetensors')


def write(folder, name, model, px, features):
  """Writes the fixture of one model."""
  model = randomise(model)
  x = images(px)
  image, tokens = features(model, x)
  arrays = {'images': x, 'image': image, 'tokens': tokens}
  weights, module = published(model), model.state_dict()
  arrays |= {f'w/{key}': value for key, value in weights.items()}
  if weights.keys() != module.keys():
    arrays |= {f'module/{key}': value for key, value in module.items()}
  np.savez_compressed(
    folder / f'{name}.npz', **{k: v.numpy() for k, v in arrays.items()}
  )


def of_timm_vit(model, x):
  """Class token and patches after the last norm."""
  y = model.forward_features(x)
  return y[:, 0], y[:, model.num_prefix_tokens :]


def of_map(channels_last, model, x):
  """Mean and positions of the last feature map."""
  y = model.forward_features(x)
  y = y.flatten(1, 2) if channels_last else y.flatten(2).transpose(1, 2)
  return y.mean(1), y


def of_hugging_face(num_prefix, model, x):
  """Class token and patches after the last norm."""
  if hasattr(model, 'classifier'):
    model = model.base_model
  y = model(x).last_hidden_state
  return y[:, 0], y[:, num_prefix:]


def write_timm(folder):
  """timm's classes."""
  vit = functools.partial(
    timm.models.vision_transformer.VisionTransformer,
    img_size=32,
    patch_size=8,
    embed_dim=16,
    depth=2,
    num_heads=2,
    mlp_ratio=2,
    num_classes=0,
  )
  write(folder, 'timm_vit', vit(), 32, of_timm_vit)
  registers = vit(
    img_size=28, patch_size=7, reg_tokens=4, no_embed_class=True, init_values=1
  )
  write(folder, 'timm_registers', registers, 28, of_timm_vit)
  embedded = vit(reg_tokens=2, qkv_bias=False)
  write(folder, 'timm_registers_with_positions', embedded, 32, of_timm_vit)
  gated = vit(
    reg_tokens=4,
    no_embed_class=True,
    init_values=1,
    mlp_ratio=3,
    mlp_layer=timm.layers.SwiGLUPacked,
    act_layer=torch.nn.SiLU,
  )
  write(folder, 'timm_swiglu', gated, 32, of_timm_vit)
  distilled = timm.models.deit.VisionTransformerDistilled(
    **vit.keywords | {'num_classes': 3}
  )
  write(folder, 'deit_distilled', distilled, 32, of_timm_vit)
  eva = functools.partial(
    timm.models.eva.Eva,
    **vit.keywords,
    init_values=1,
    rope_type='dinov3',
    rope_temperature=100,
    rope_rotate_half=True,
    use_rot_pos_emb=True,
    use_abs_pos_emb=False,
    num_reg_tokens=4,
    use_fc_norm=False,
    norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-5),
  )
  gated = eva(swiglu_mlp=True, swiglu_align_to=8)
  write(folder, 'timm_dinov3', gated, 32, of_timm_vit)
  write(folder, 'timm_rotary', eva(attn_type='rope'), 32, of_timm_vit)
  swin = timm.models.swin_transformer.SwinTransformer(
    img_size=32,
    patch_size=4,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    mlp_ratio=2,
    num_classes=0,
  )
  write(folder, 'timm_swin', swin, 32, functools.partial(of_map, True))
  for name, block, layers in (
    ('timm_resnet18', timm.models.resnet.BasicBlock, (2, 2, 2, 2)),
    ('timm_resnet50', timm.models.resnet.Bottleneck, (3, 4, 6, 3)),
  ):
    resnet = timm.models.resnet.ResNet(
      block, layers, channels=(2, 4, 8, 16), num_classes=0
    )
    write(folder, name, resnet, 32, functools.partial(of_map, False))


def write_hugging_face(folder):
  """The classes of transformers."""
  sizes = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
  )
  vit = transformers.ViTConfig(intermediate_size=32, **sizes)
  dinov2 = transformers.Dinov2Config(mlp_ratio=2, **sizes)
  gated = transformers.Dinov2Config(mlp_ratio=3, use_swiglu_ffn=True, **sizes)
  registers = transformers.Dinov2WithRegistersConfig(
    mlp_ratio=2, num_register_tokens=3, **sizes
  )
  dinov3 = functools.partial(
    transformers.DINOv3ViTConfig,
    intermediate_size=32,
    num_register_tokens=3,
    **sizes,
  )
  for name, model, num_prefix in (
    ('hf_vit', transformers.ViTModel(vit), 1),
    ('hf_vit_classifier', transformers.ViTForImageClassification(vit), 1),
    ('hf_dinov2', transformers.Dinov2Model(dinov2), 1),
    ('hf_dinov2_swiglu', transformers.Dinov2Model(gated), 1),
    (
      'hf_dinov2_registers',
      transformers.Dinov2WithRegistersForImageClassification(registers),
      4,
    ),
    ('hf_dinov3', transformers.DINOv3ViTModel(dinov3()), 4),
    (
      'hf_dinov3_gated',
      transformers.DINOv3ViTModel(
        dinov3(use_gated_mlp=True, hidden_act='silu')
      ),
      4,
    ),
  ):
    features = functools.partial(of_hugging_face, num_prefix)
    write(folder, name, model, 32, features)


def write_resized(folder):
  """Bias tables of one window for others, by torch's interpolation."""
  generator = torch.Generator().manual_seed(2)
  table = torch.randn((49, 2), generator=generator)
  arrays = {'table': table.numpy()}
  for side in (5, 13):
    square = table.T.reshape(1, 2, 7, 7)
    resized = torch.nn.functional.interpolate(
      square, size=(side, side), mode='bicubic', align_corners=False
    )
    arrays[str(side)] = resized.reshape(2, -1).T.numpy()
  np.savez_compressed(folder / 'bias_tables.npz', **arrays)


def main():
  """Writes all fixtures into the folder that the command line names."""
  folder = pathlib.Path(sys.argv[1])
  folder.mkdir(parents=True, exist_ok=True)
  torch.set_num_threads(1)
  with torch.no_grad():
    write_timm(folder)
    write_hugging_face(folder)
    write_resized(folder)


if __name__ == '__main__':
  main()
