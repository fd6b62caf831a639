"""MiniGPT-5: a MiniGPT-4 whose voken tokens become the conditioning of a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfuse.models.blip2.language import nucleus, without_frequencies
from mmfuse.models.minigpt4.model import IMAGE, MiniGPT4, places


class Tokens(NamedTuple):
    """Ids of the language model's tokenizer. Vokens are `first` to `first` + n - 1; old ids are below `base_size`."""

    bos: int
    eos: int
    first: int
    image: int
    base_size: int


class Embedded(NamedTuple):
    """Interleaved texts and images as the language model reads them; padding is zeros."""

    embeds: Tensor  # [B, S, width]
    mask: Tensor  # [B, S]
    labels: Tensor  # [B, S]


class Draws(NamedTuple):
    """The random draws of a step, for each of G groups of vokens."""

    latent: Tensor  # [G, 4, h, w], normal, of the autoencoder's sample
    noise: Tensor  # [G, 4, h, w], normal
    timesteps: Tensor  # int64 [G]
    drop: Tensor  # [G], 1 = without conditioning, for classifier-free guidance


class Losses(NamedTuple):
    text_loss: Tensor
    image_loss: Tensor
    caption_loss: Tensor | None

    @property
    def total(self) -> Tensor:
        loss = 0.01 * self.text_loss + self.image_loss
        return loss if self.caption_loss is None else loss + 0.1 * self.caption_loss


class Generated(NamedTuple):
    ids: Tensor  # [T], new tokens; of a group of vokens the first alone
    prompt_embeds: Tensor | None  # [1, P, d], what a diffusion pipeline takes; None without vokens
    negative_prompt_embeds: Tensor | None  # of no features


class MiniGPT5(nn.Module):
    """Text and images in, text and images out (section 3).

    Args:
        model: MiniGPT-4, whose language model knows the vokens.
        sd_text_encoder: of the diffusion model, CLIP's; its width is the conditioning's.
        mapping: of the transformer between vokens and conditioning.
        vokens: n, of a group.
        scheduler: {"beta_start", "beta_end", "num_train_timesteps"} of the noise.
        unet: of diffusers, unet(latents, timesteps, conditioning).sample; None where there is none.
        vae_scaling_factor: of the latents.
        snr_loss: weight steps by min(snr, 5) / snr (Hang et al. 2023, arXiv:2303.09556).
        stage_2: `fc` and the decoder's prompt do not learn.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        model: MiniGPT4,
        sd_text_encoder: nn.Module,
        mapping: Mapping[str, Any],
        tokens: Tokens,
        vokens: int = 8,
        prompts: int = 77,
        scheduler: Mapping[str, Any] | None = None,
        unet: nn.Module | None = None,
        vae_scaling_factor: float = 0.18215,
        snr_loss: bool = True,
        stage_2: bool = False,
    ):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.image_resolution = model.image_resolution
        self.tokens, self.vokens = tokens, vokens
        self.vae_scaling_factor, self.snr_loss = vae_scaling_factor, snr_loss
        self.sd_text_encoder: Any = sd_text_encoder.requires_grad_(False)
        self.embed_dim = width = self.sd_text_encoder.config.hidden_size
        self.fc = nn.Sequential(nn.Linear(model.embed_dim, width), nn.GELU(), nn.Linear(width, mapping["d_model"]))
        self.llm_to_t2i_mapping = nn.Transformer(**mapping, dropout=0.0)
        self.t2i_decoder_prompt = nn.Parameter(torch.randn(1, prompts, mapping["d_model"]))
        self.unet = None if unet is None else unet.requires_grad_(False)
        if stage_2:
            self.fc.requires_grad_(False)
            self.t2i_decoder_prompt.requires_grad_(False)
        for name, p in model.llama_model.named_parameters():
            of_words = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            p.requires_grad_("lora_" in name or "modules_to_save" in name or of_words)
        given = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000} | dict(scheduler or {})
        ends = given["beta_start"] ** 0.5, given["beta_end"] ** 0.5
        betas = torch.linspace(*ends, given["num_train_timesteps"], dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float(), persistent=False)

    # --- the language model -------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, mask: Tensor, labels: Tensor, images: Tensor) -> Embedded:
        """Bos before texts [B, L], in which the i-th image token of a row is image i of images [B, n, 3, R, R]."""
        bos = torch.full_like(ids[:, :1], self.tokens.bos)
        ids = torch.cat([bos, ids.masked_fill(ids == self.tokens.image, IMAGE)], dim=1)
        with torch.no_grad():
            prompt = self.model.image_prompt(images)
        at = places(ids, prompt.shape[2])
        words = self.model.llama_model.get_input_embeddings()(ids.gather(1, at.token).clamp(min=0))
        row = torch.arange(len(ids), device=ids.device)[:, None]
        embeds = torch.where(at.of_image[..., None], prompt[row, at.nth, at.within], words)
        mask, labels = (
            torch.cat([torch.ones_like(bos), mask], dim=1),
            torch.cat([torch.full_like(bos, -100), labels], 1),
        )
        return Embedded(
            embeds * at.real[..., None],
            mask.gather(1, at.token) * at.real,
            labels.gather(1, at.token).masked_fill(at.of_image | ~at.real, -100),
        )

    def read(self, given: Embedded) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits [B, S, vocabulary], last states [B, S, width], normalised)."""
        found = self.model.llama_model(
            inputs_embeds=given.embeds,
            attention_mask=given.mask,
            labels=given.labels,
            output_hidden_states=True,
        )
        return found.loss, found.logits, found.hidden_states[-1]

    def voken_places(self, labels: Tensor) -> Tensor:
        """int64 [G, 2], (row, place) of the state that predicts the first voken of each group."""
        return (labels == self.tokens.first).nonzero() - torch.tensor([0, 1], device=labels.device)

    def voken_states(self, states: Tensor, where: Tensor, drop: Tensor) -> Tensor:
        """[G, n, width], from the state before the first voken on; 0 for groups that are dropped."""
        row, place = where.unbind(1)
        found = states[row[:, None], place[:, None] + torch.arange(self.vokens, device=states.device)]
        return found * (1 - drop.to(found.dtype))[:, None, None]

    # --- the conditioning ---------------------------------------------------------------------------------------

    def conditioning(self, voken_states: Tensor) -> Tensor:
        """[G, P, d], for the diffusion model, of states [G, n, width] (equation 4)."""
        prompt = self.t2i_decoder_prompt.expand(len(voken_states), -1, -1)
        return self.llm_to_t2i_mapping(self.fc(voken_states), prompt)

    @torch.no_grad()
    def caption_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, P, d], the diffusion model's own conditioning, of captions [B, P]."""
        return self.sd_text_encoder(ids, attention_mask=mask).last_hidden_state

    # --- the diffusion model ------------------------------------------------------------------------------------

    def latents(self, moments: Tensor, draw: Tensor) -> Tensor:
        """A sample of the autoencoder's normal distribution: moments [G, 8, h, w], its mean and log-variance."""
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * draw) * self.vae_scaling_factor

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        a = self.alphas_cumprod[timesteps][:, None, None, None].to(latents.dtype)
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def snr_weights(self, timesteps: Tensor) -> Tensor:
        """min(snr, 5) / snr, [G]."""
        a = self.alphas_cumprod[timesteps]
        snr = a / (1 - a)
        return snr.clamp(max=5) / snr

    def image_loss(self, predicted: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Of the noise that was predicted, [G, 4, h, w]."""
        loss = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        return (loss * self.snr_weights(timesteps).to(loss.dtype)).mean() if self.snr_loss else loss.mean()

    # --- steps --------------------------------------------------------------------------------------------------

    def draw(self, moments: Tensor, groups: int) -> Draws:
        shape = groups, moments.shape[1] // 2, *moments.shape[2:]
        latent, noise = (torch.randn(shape, dtype=moments.dtype, device=moments.device) for _ in range(2))
        timesteps = torch.randint(len(self.alphas_cumprod), (groups,), device=moments.device)
        return Draws(latent, noise, timesteps, torch.rand(groups, device=moments.device) < 0.1)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        images: Tensor,
        moments: Tensor,
        captions: tuple[Tensor, Tensor] | None = None,
        empty_caption: tuple[Tensor, Tensor] | None = None,
        *,
        draws: Draws | None = None,
    ) -> Losses:
        """The losses of a training step (equations 2, 3 and 5).

        Args:
            ids, mask, labels: [B, L]; of the vokens the labels keep the first and the last.
            images: [B, n, 3, R, R], read at the image tokens.
            moments: [B, 8, h, w], of the autoencoder, of the image that a row writes.
            captions, empty_caption: ids and mask, [B, P] and [1, P], for the diffusion model's text encoder.
            draws: by default drawn.
        """
        if self.unet is None:
            raise ValueError("unet is None, expected the diffusion model's")
        given = self.embed(ids, mask, labels, images)
        text_loss, _, states = self.read(given)
        where = self.voken_places(given.labels)
        moments = moments[where[:, 0]]
        draws = draws or self.draw(moments, len(where))
        conditioning = self.conditioning(self.voken_states(states, where, draws.drop))
        noisy = self.noisy(self.latents(moments, draws.latent), draws.noise, draws.timesteps)
        predicted = self.unet(noisy, draws.timesteps, conditioning).sample
        caption_loss = None
        if captions is not None:
            caption_loss = F.mse_loss(conditioning, self.targets(captions, empty_caption, where[:, 0], draws.drop))
        return Losses(text_loss, self.image_loss(predicted, draws.noise, draws.timesteps), caption_loss)

    def targets(
        self, captions: tuple[Tensor, Tensor], empty: tuple[Tensor, Tensor] | None, rows: Tensor, drop: Tensor
    ) -> Tensor:
        """The features of the captions of groups, [G, P, d]; of the empty one where a group is dropped."""
        features = self.caption_features(*captions)[rows]
        if empty is None:
            raise ValueError("empty_caption is None, expected ids and mask as captions are given")
        return torch.where(drop.bool()[:, None, None], self.caption_features(*empty), features)

    def keep_old_words(self) -> None:
        """Gradients of 0 for the words that the language model had before; after backward, before the step."""
        for name, p in self.model.llama_model.named_parameters():
            if p.grad is not None and ("embed_tokens" in name or "lm_head" in name):
                p.grad[: self.tokens.base_size] = 0

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        images: Tensor,
        max_new_tokens: int = 128,
        force_image: bool = False,
        repetition_penalty: float = 2.0,
        top_p: float | None = None,
    ) -> Generated:
        """What follows a prompt [1, L] with images [1, n, 3, R, R], the likeliest word or one of the nucleus `top_p`.

        At the first voken the others are read with it, and the conditioning of their states is found, with that of no
        features for classifier-free guidance. force_image: the first token is that voken.
        """
        given = self.embed(ids, torch.ones_like(ids), torch.full_like(ids, -100), images)
        words, vokens = self.model.llama_model.get_input_embeddings(), torch.arange(self.vokens, device=ids.device)
        embeds, cache, before = given.embeds, None, None
        new, conditioning = ids.new_full((1,), self.tokens.bos), None  # bos counts in the penalty
        for step in range(max_new_tokens + 1):
            found = self.model.llama_model(
                inputs_embeds=embeds, past_key_values=cache, use_cache=True, output_hidden_states=True
            )
            cache, states = found.past_key_values, found.hidden_states[-1]
            if before is not None:
                # the state that predicted the first voken, and those of all vokens but the last
                conditioning = self.conditioning(torch.cat([before, states[:, :-1]], dim=1))
                before = None
            if step == max_new_tokens:  # read for a voken that came last
                break
            logits = found.logits[0, -1].float()
            seen = logits[new]
            logits[new] = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
            word = logits.argmax() if top_p is None else nucleus(logits, top_p)
            if force_image and step == 0:
                word = torch.full_like(word, self.tokens.first)
            new = torch.cat([new, word[None]])
            if word == self.tokens.eos:
                break
            embeds = words(word[None, None])
            if word == self.tokens.first:
                before, embeds = states[:, -1:], words(self.tokens.first + vokens[None])
        negative = None
        if conditioning is not None:
            nothing = embeds.new_zeros(1, self.vokens, self.model.embed_dim)
            negative = self.conditioning(nothing)
        return Generated(new[1:], conditioning, negative)

    def official_state(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without what older releases of transformers stored, and with the text encoder's names of today's."""
        own, state = self.state_dict(), {}
        for key, t in without_frequencies(state_dict).items():
            renamed = key.replace("sd_text_encoder.text_model.", "sd_text_encoder.")
            state[renamed if renamed in own else key] = t
        return state
