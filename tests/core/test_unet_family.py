"""One U-Net call taken apart into tiles: every argument, against calls tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from peft import LoraConfig
from torch import Tensor, nn

from latent_tiles.errors import FamilyError, GeometryError
from latent_tiles.families import ModelCall, family_of, supported
from latent_tiles.families.unet import UNetCall
from latent_tiles.geometry import Box, Size

BOXES = [Box(0, 0, 16, 12), Box(0, 8, 16, 12), Box(8, 4, 16, 12)]
CANVAS = Size(24, 20)
ROWS = 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def crop(tensor: Tensor, box: Box) -> Tensor:
    rows, columns = box.to_slices()
    return tensor[..., rows, columns]


@pytest.fixture(scope="session")
def plain() -> UNet2DConditionModel:
    return tiny.unet()


class Recorder:
    """Stands in for a forward: keeps the arguments, answers with zeros of the right shape."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        assert not args
        self.arguments = kwargs
        return (torch.zeros_like(kwargs["sample"][:, :4]),)


def recorded(module: nn.Module, sample: Tensor, boxes: Sequence[Box] = BOXES, **arguments: Any) -> dict[str, Any]:
    recorder = Recorder()
    call = UNetCall(module, recorder, (sample, 10, randn(sample.shape[0], 5, tiny.WIDTH)), arguments)
    call.run_tiles(boxes, [crop(call.noisy, box) for box in boxes])
    return recorder.arguments


@torch.no_grad()
def check_tile_by_tile(unet: Any, sample: Tensor, timestep: Any, text: Tensor, **arguments: Any) -> None:
    """`run_tiles` on several tiles equals the model called on each crop; also where tiles see another latent."""
    call = UNetCall(unet, unet.forward, (sample, timestep, text), arguments)
    seen = [crop(call.noisy, box) + 0.1 * number for number, box in enumerate(BOXES)]
    found = call.run_tiles(BOXES, seen)
    assert len(found) == len(BOXES)
    for box, tile, prediction in zip(BOXES, seen, found, strict=True):
        whole = torch.cat([tile, crop(sample[:, 4:], box)], dim=1)
        expected = unet(whole, timestep, text, **arguments).sample
        torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)
    # And no tile gets another's: they differ.
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize(
    "timestep", [500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500, 20])], ids=repr
)
def test_timesteps_of_every_form(plain: UNet2DConditionModel, timestep: Any) -> None:
    check_tile_by_tile(plain, randn(ROWS, 4, *CANVAS), timestep, randn(ROWS, 5, tiny.WIDTH))


def test_rows_keep_their_own_text(plain: UNet2DConditionModel) -> None:
    """Rows are concatenated tile by tile, in the order of the text's rows."""
    text = randn(3, 5, tiny.WIDTH, seed=4) * torch.tensor([0.1, 1, 10]).view(3, 1, 1)
    check_tile_by_tile(plain, randn(1, 4, *CANVAS).repeat(3, 1, 1, 1), 300, text)


def test_one_row(plain: UNet2DConditionModel) -> None:
    check_tile_by_tile(plain, randn(1, 4, *CANVAS), torch.tensor([7]), randn(1, 5, tiny.WIDTH))


def test_the_x4_upscaler_with_its_low_resolution_image_and_class_labels() -> None:
    unet = tiny.unet(in_channels=7, num_class_embeds=1000)
    sample, text = randn(ROWS, 7, *CANVAS), randn(ROWS, 5, tiny.WIDTH)
    for labels in (torch.tensor([20, 900]), torch.tensor([20])):
        check_tile_by_tile(unet, sample, torch.tensor(400), text, class_labels=labels)
    assert UNetCall(unet, unet.forward, (sample, 1, text), {}).noisy.shape == (ROWS, 4, *CANVAS)


def test_instruct_pix2pix_with_its_encoded_image() -> None:
    unet = tiny.unet(in_channels=8)
    check_tile_by_tile(unet, randn(3, 8, *CANVAS), torch.tensor(400), randn(3, 5, tiny.WIDTH))


def test_sdxl_with_its_added_conditions() -> None:
    unet = tiny.unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + tiny.WIDTH,
    )
    added = {"text_embeds": randn(ROWS, tiny.WIDTH, seed=5), "time_ids": 100 * randn(ROWS, 6, seed=6).abs()}
    check_tile_by_tile(
        unet, randn(ROWS, 4, *CANVAS), torch.tensor(400), randn(ROWS, 5, tiny.WIDTH), added_cond_kwargs=added
    )


def test_masks_over_the_text(plain: UNet2DConditionModel) -> None:
    mask = torch.tensor([[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    sample, text = randn(ROWS, 4, *CANVAS), randn(ROWS, 5, tiny.WIDTH)
    check_tile_by_tile(plain, sample, 400, text, encoder_attention_mask=mask)


def test_a_guidance_embedding() -> None:
    """LCM's distilled U-Nets take the guidance scale as `timestep_cond`."""
    unet = tiny.unet(time_cond_proj_dim=8)
    sample, text = randn(ROWS, 4, *CANVAS), randn(ROWS, 5, tiny.WIDTH)
    check_tile_by_tile(unet, sample, 400, text, timestep_cond=randn(ROWS, 8, seed=9))


def test_positional_and_keyword_arguments_are_one() -> None:
    unet, sample, text = tiny.unet(), randn(ROWS, 4, *CANVAS), randn(ROWS, 5, tiny.WIDTH)
    for args, kwargs in (
        ((sample, 10, text), {}),
        ((sample, 10), {"encoder_hidden_states": text}),
        ((), {"sample": sample, "timestep": 10, "encoder_hidden_states": text, "class_labels": None}),
    ):
        recorder = Recorder()
        call = UNetCall(unet, recorder, args, kwargs)
        assert call.timestep == 10
        assert call.canvas == CANVAS
        call.run_tiles(BOXES[:1], [crop(sample, BOXES[0])])
        assert set(recorder.arguments) == {"sample", "timestep", "encoder_hidden_states", "return_dict"}


def test_it_is_a_model_call(plain: UNet2DConditionModel) -> None:
    assert isinstance(UNetCall(plain, plain.forward, (randn(1, 4, *CANVAS), 1, randn(1, 5, tiny.WIDTH)), {}), ModelCall)


@torch.no_grad()
def test_the_whole_call_is_the_hosts_own(plain: UNet2DConditionModel) -> None:
    sample, text = randn(ROWS, 4, *CANVAS), randn(ROWS, 5, tiny.WIDTH)
    call = UNetCall(plain, plain.forward, (sample, 10), {"encoder_hidden_states": text})
    assert torch.equal(call.run_whole().sample, plain(sample, 10, text).sample)
    handed: list[Any] = []
    UNetCall(
        plain, lambda *args, **kwargs: handed.append((args, kwargs)), (sample, 10), {"encoder_hidden_states": text}
    ).run_whole()
    assert handed[0][0][0] is sample
    assert handed[0][1]["encoder_hidden_states"] is text


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_answer_has_the_form_and_dtype_that_the_host_expects(
    plain: UNet2DConditionModel, dtype: torch.dtype, return_dict: bool
) -> None:
    sample = randn(1, 4, *CANVAS).to(dtype)
    call = UNetCall(plain, plain.forward, (sample, 1, randn(1, 5, tiny.WIDTH)), {"return_dict": return_dict})
    answer = call.wrap(randn(1, 4, *CANVAS))
    if return_dict:
        assert isinstance(answer, UNet2DConditionOutput)
        prediction = answer.sample
    else:
        assert isinstance(answer, tuple)
        (prediction,) = answer
    assert prediction.dtype == dtype
    assert torch.equal(prediction, randn(1, 4, *CANVAS).to(dtype))


def test_the_default_is_an_output_object(plain: UNet2DConditionModel) -> None:
    call = UNetCall(plain, plain.forward, (randn(1, 4, *CANVAS), 1, randn(1, 5, tiny.WIDTH)), {})
    assert isinstance(call.wrap(randn(1, 4, *CANVAS)), UNet2DConditionOutput)


@torch.no_grad()
def test_half_precision_stays_half_precision() -> None:
    unet = tiny.unet().to(torch.bfloat16)
    sample, text = randn(1, 4, *CANVAS).bfloat16(), randn(1, 5, tiny.WIDTH).bfloat16()
    call = UNetCall(unet, unet.forward, (sample, 10, text), {})
    assert {tile.dtype for tile in call.run_tiles(BOXES, [crop(sample, box) for box in BOXES])} == {torch.bfloat16}


# ControlNet and T2I-Adapter


@torch.no_grad()
def test_controlnet_residuals_are_cropped_at_every_level(plain: UNet2DConditionModel) -> None:
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(plain, conditioning_channels=3).eval()
    for parameter in controlnet.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)  # its zero convolutions say nothing otherwise
    sample, text = randn(ROWS, 4, *CANVAS), randn(ROWS, 5, tiny.WIDTH)
    picture = randn(ROWS, 3, CANVAS.height * 8, CANVAS.width * 8)
    down, mid = controlnet(sample, 10, text, controlnet_cond=picture, return_dict=False)
    assert len({tuple(one.shape[-2:]) for one in (*down, mid)}) == 2
    call = UNetCall(
        plain,
        plain.forward,
        (sample, 10, text),
        {"down_block_additional_residuals": down, "mid_block_additional_residual": mid},
    )
    found = call.run_tiles(BOXES, [crop(sample, box) for box in BOXES])
    for box, prediction in zip(BOXES, found, strict=True):

        def cut(tensor: Tensor, box: Box = box) -> Tensor:
            return crop(tensor, box.shrunk(CANVAS.height // tensor.shape[-2]))

        expected = plain(
            crop(sample, box),
            10,
            text,
            down_block_additional_residuals=[cut(one) for one in down],
            mid_block_additional_residual=cut(mid),
        ).sample
        torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(prediction, plain(crop(sample, box), 10, text).sample, atol=1e-2)


@torch.no_grad()
def test_adapter_features_are_cropped_and_the_hosts_list_is_left_whole(plain: UNet2DConditionModel) -> None:
    height, width = CANVAS
    features = [randn(ROWS, 8, height // 2, width // 2, seed=1), randn(ROWS, 16, height // 2, width // 2, seed=2)]
    sample, text = randn(ROWS, 4, *CANVAS), randn(ROWS, 5, tiny.WIDTH)
    arguments = {"down_intrablock_additional_residuals": list(features)}
    call = UNetCall(plain, plain.forward, (sample, 10, text), arguments)
    for _ in range(2):  # the model pops from its list
        found = call.run_tiles(BOXES, [crop(sample, box) for box in BOXES])
        for box, prediction in zip(BOXES, found, strict=True):
            cut = [crop(one, box.shrunk(2)) for one in features]
            expected = plain(crop(sample, box), 10, text, down_intrablock_additional_residuals=cut).sample
            torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)
    assert len(arguments["down_intrablock_additional_residuals"]) == 2


@pytest.mark.parametrize("shape", [(24, 10), (7, 20), (48, 40), (9, 7)])
def test_features_that_are_no_whole_fraction_are_refused(plain: UNet2DConditionModel, shape: tuple[int, int]) -> None:
    with pytest.raises(FamilyError, match=r"mid_block_additional_residual of \(.*\) is not a whole fraction of the"):
        recorded(plain, randn(ROWS, 4, *CANVAS), mid_block_additional_residual=randn(ROWS, 16, *shape))


def test_controlnet_residuals_of_another_number_of_rows_are_refused(plain: UNet2DConditionModel) -> None:
    height, width = CANVAS
    residual = randn(ROWS + 1, 16, height // 2, width // 2)
    with pytest.raises(FamilyError, match=f"mid_block_additional_residual has {ROWS + 1} rows, the sample {ROWS}"):
        recorded(plain, randn(ROWS, 4, *CANVAS), mid_block_additional_residual=residual)


def test_tiles_between_features_are_refused(plain: UNet2DConditionModel) -> None:
    with pytest.raises(GeometryError, match="plan the grid with multiple_of=2"):
        recorded(
            plain,
            randn(ROWS, 4, *CANVAS),
            boxes=[Box(3, 0, 8, 8)],
            mid_block_additional_residual=randn(ROWS, 16, 12, 10),
        )


# IP-Adapter and LoRA


@pytest.mark.parametrize("factor", [1, 8])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_ip_adapter_masks_are_cropped(plain: UNet2DConditionModel, as_tensor: bool, factor: int) -> None:
    masks = randn(2, 1, CANVAS.height * factor, CANVAS.width * factor)
    given = masks if as_tensor else [masks[:1], None, masks[1:]]
    found = recorded(plain, randn(ROWS, 4, *CANVAS), cross_attention_kwargs={"ip_adapter_masks": given, "scale": 0.5})[
        "cross_attention_kwargs"
    ]
    assert found["scale"] == 0.5
    cut = found["ip_adapter_masks"]
    assert len(cut) == len(given)
    for own, mask in zip(cut, masks if as_tensor else given, strict=True):
        if mask is None:
            assert own is None
            continue
        assert own.shape == (len(BOXES) * ROWS, 1, 16 * factor, 12 * factor)
        for number, box in enumerate(BOXES):
            expected = crop(mask.view(1, 1, *mask.shape[-2:]), box.scaled(factor))
            assert torch.equal(own[number * ROWS : (number + 1) * ROWS], expected.expand(ROWS, -1, -1, -1))


def test_several_images_of_one_adapter_keep_their_masks(plain: UNet2DConditionModel) -> None:
    masks = randn(1, 3, *CANVAS)
    found = recorded(plain, randn(ROWS, 4, *CANVAS), cross_attention_kwargs={"ip_adapter_masks": [masks]})
    (own,) = found["cross_attention_kwargs"]["ip_adapter_masks"]
    assert torch.equal(own[0], crop(masks, BOXES[0])[0])
    assert torch.equal(own[-1], crop(masks, BOXES[-1])[0])


@pytest.mark.parametrize("shape", [(12, 10), (25, 20), (48, 20), (24, 40)])
def test_masks_of_another_size_are_refused(plain: UNet2DConditionModel, shape: tuple[int, int]) -> None:
    with pytest.raises(
        FamilyError, match=r"IP-Adapter mask of \(.*\) px is not a whole multiple of the canvas \(24, 20"
    ):
        recorded(plain, randn(1, 4, *CANVAS), cross_attention_kwargs={"ip_adapter_masks": [randn(1, 1, *shape)]})


def test_the_hosts_arguments_are_not_changed(plain: UNet2DConditionModel) -> None:
    masks = [randn(1, 1, *CANVAS)]
    given = {"ip_adapter_masks": masks, "scale": 1.0}
    recorded(plain, randn(ROWS, 4, *CANVAS), cross_attention_kwargs=given)
    assert given["ip_adapter_masks"] is masks
    assert masks[0].shape == (1, 1, *CANVAS)


@torch.no_grad()
def test_the_scale_of_a_lora_acts_on_tiles() -> None:
    unet = tiny.unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    unet.eval()
    sample, text = randn(ROWS, 4, *CANVAS), randn(ROWS, 5, tiny.WIDTH)
    results = {}
    for scale in (0.0, 0.5, 1.0):
        arguments = {"cross_attention_kwargs": {"scale": scale}}
        check_tile_by_tile(unet, sample, 10, text, **arguments)
        call = UNetCall(unet, unet.forward, (sample, 10, text), arguments)
        results[scale] = call.run_tiles(BOXES, [crop(sample, box) for box in BOXES])[0]
        assert arguments == {"cross_attention_kwargs": {"scale": scale}}
    assert not torch.allclose(results[0.0], results[0.5], atol=1e-4)
    assert not torch.allclose(results[0.5], results[1.0], atol=1e-4)


# Refusals


@pytest.mark.parametrize("key", ["gligen", "hypernetwork"])
def test_unknown_attention_arguments_are_refused(plain: UNet2DConditionModel, key: str) -> None:
    message = (
        rf"cross_attention_kwargs \['{key}'\] are not known to be safe under tiling; known are \['ip_adapter_masks', 's"
    )
    with pytest.raises(FamilyError, match=message):
        recorded(plain, randn(1, 4, *CANVAS), cross_attention_kwargs={key: {}, "scale": 1.0})


class NewerUNet(UNet2DConditionModel):
    """A later diffusers' U-Net, with an argument that nobody here has heard of."""

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, spatial_prompt: Any = None) -> Any:
        raise NotImplementedError


def test_unknown_arguments_are_refused() -> None:
    unet: Any = NewerUNet.__new__(NewerUNet)
    nn.Module.__init__(unet)
    unet.register_to_config(out_channels=4)
    with pytest.raises(
        FamilyError, match="argument 'spatial_prompt' is not known to be safe under tiling; leave it out"
    ):
        recorded(unet, randn(1, 4, *CANVAS), spatial_prompt=randn(1))
    assert "spatial_prompt" not in recorded(unet, randn(1, 4, *CANVAS), spatial_prompt=None)


def test_a_mask_over_the_canvas_is_refused(plain: UNet2DConditionModel) -> None:
    """`attention_mask` has one entry for each position of self-attention, at every level: no crop of it is known."""
    with pytest.raises(FamilyError, match="argument 'attention_mask' is not known to be safe under tiling"):
        recorded(plain, randn(ROWS, 4, *CANVAS), attention_mask=torch.ones(ROWS, CANVAS.area))


@pytest.mark.parametrize("name", ["class_labels", "timestep_cond", "encoder_attention_mask"])
def test_wrong_row_counts_are_refused(plain: UNet2DConditionModel, name: str) -> None:
    with pytest.raises(FamilyError, match=f"{name} has 3 rows, the sample 2; expected as many, or one for all"):
        recorded(plain, randn(ROWS, 4, *CANVAS), **{name: torch.zeros(3, 8)})


def test_wrong_row_counts_inside_nested_arguments_are_refused(plain: UNet2DConditionModel) -> None:
    added = {"image_embeds": [torch.zeros(ROWS, 1, 8), torch.zeros(3, 1, 8)]}
    with pytest.raises(FamilyError, match="added_cond_kwargs has 3 rows, the sample 2"):
        recorded(plain, randn(ROWS, 4, *CANVAS), added_cond_kwargs=added)


def test_nested_arguments_keep_their_form(plain: UNet2DConditionModel) -> None:
    added = {"image_embeds": [randn(ROWS, 1, 8), (randn(1, 3), 7, None)], "flag": torch.tensor(1)}
    found = recorded(plain, randn(ROWS, 4, *CANVAS), added_cond_kwargs=added)["added_cond_kwargs"]
    assert torch.equal(found["image_embeds"][0], added["image_embeds"][0].repeat(3, 1, 1))
    assert isinstance(found["image_embeds"][1], tuple)
    assert torch.equal(found["image_embeds"][1][0], added["image_embeds"][1][0])
    assert found["image_embeds"][1][1:] == (7, None)
    assert found["flag"] is added["flag"]


@pytest.mark.parametrize("shape", [(4, 24, 20), (1, 3, 24, 20)])
def test_samples_of_another_shape_are_refused(plain: UNet2DConditionModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(FamilyError, match=r"expected a sample of \(rows, >= 4, height, width\), got \("):
        UNetCall(plain, plain.forward, (randn(*shape), 1, randn(1, 5, tiny.WIDTH)), {})


# The registry


def test_unets_and_their_subclasses_are_supported(plain: UNet2DConditionModel) -> None:
    assert "UNet2DConditionModel" in supported()
    assert family_of(plain) is UNetCall
    newer: Any = NewerUNet.__new__(NewerUNet)
    nn.Module.__init__(newer)
    assert family_of(newer) is UNetCall


def test_other_models_are_refused_and_the_supported_are_named() -> None:
    with pytest.raises(FamilyError, match="Linear cannot be tiled; supported are UNet2DConditionModel"):
        family_of(nn.Linear(1, 1))
