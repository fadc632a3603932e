import importlib.util
import logging
from typing import Any

import pytest
import tiny
import torch

from latent_tiles.errors import SettingError
from latent_tiles.pipelines.attention import select_attention

HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
without_xformers = pytest.mark.skipif(HAS_XFORMERS, reason="xformers is installed")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.host_pipeline("StableDiffusionImg2ImgPipeline")


@without_xformers
def test_auto_falls_to_sdpa_and_logs_why(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="latent_tiles.pipelines.attention")
    assert select_attention(pipe, "auto") == "sdpa"
    assert "xformers cannot run here: ModuleNotFoundError" in caplog.text


@without_xformers
def test_asked_for_xformers_names_the_reason(pipe: Any) -> None:
    with pytest.raises(SettingError, match="No module named 'xformers'; use 'sdpa' or 'auto'"):
        select_attention(pipe, "xformers")


def test_sdpa_leaves_the_pipeline_alone(pipe: Any) -> None:
    before = dict(pipe.unet.attn_processors)
    assert select_attention(pipe, "sdpa") == "sdpa"
    assert pipe.unet.attn_processors == before


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_XFORMERS, reason="xformers is not installed")
def test_xformers_is_taken_where_it_runs_and_given_back(pipe: Any) -> None:
    pipe.to("cuda")
    try:
        assert select_attention(pipe, "auto") == "xformers"
        assert all("XFormers" in type(entry).__name__ for entry in pipe.unet.attn_processors.values())
        image = torch.rand(1, 3, 64, 64)
        fast = pipe(prompt="a", image=image, strength=0.5, num_inference_steps=2, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        assert select_attention(pipe, "sdpa") == "sdpa"
        plain = pipe(prompt="a", image=image, strength=0.5, num_inference_steps=2, output_type="pt",
                     generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        torch.testing.assert_close(fast, plain, atol=1e-2, rtol=0)
    finally:
        pipe.to("cpu")
