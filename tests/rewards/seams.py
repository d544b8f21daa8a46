"""One reward model asked for one score at every place where scores are read.

Tokenizers of a few letters, so that whatever is sampled is text, in two kinds; and
chat templates that end a turn in the ways of the field.
"""

import jax
import numpy as np

from jalign import data, forward, generate, models, rewards
from jalign.models import ModelConfig
from jalign.pretrained import Pretrained, load_pretrained, settle

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
SPECIALS += ["<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzU[]/INST:A", "Ġ", "Ċ"]

TEMPLATES = {
    "text": None,
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + "
    "eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "llama2": "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}  # others end in </s>
KINDS = ("bytes", "sentencepiece")


def tokenizer(kind: str, template: str):
    """Its EOS is </s> whatever the template ends a turn with, as in a base model."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models as kinds,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    letters = LETTERS
    if kind == "sentencepiece":
        letters = [{"Ġ": "▁", "Ċ": "\n"}.get(x, x) for x in LETTERS]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *letters])}
    core = Tokenizer(kinds.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.add_special_tokens(SPECIALS)
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
        core.decoder = decoders.ByteLevel()
    else:  # as LLaMA's
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(steps)
        back = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(back)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATES[template]
    return made


def config_of(made) -> ModelConfig:
    """Of a tiny model whose config.json pads with its EOS, as many do."""
    config = ModelConfig(
        vocab_size=len(SPECIALS) + len(LETTERS),
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        eos_token_ids=(2,),
        pad_token_id=2,
    )
    return settle(config, made)


def sample(kind: str, template: str, count: int) -> rewards.Samples:
    """Completions as a rollout makes them, ended by a stop token or by the limit."""
    made, rng = tokenizer(kind, template), np.random.default_rng(0)
    words = [f"say {'abcdefgh'[i % 8]}{'x' * (i % 3)}" for i in range(count)]
    rows = [{"prompt": w if template == "text" else [_turn(w)]} for w in words]
    prompts, _ = data.prompt_examples(rows, made, max_prompt_length=64)
    stops = data.stop_tokens(made, (2,))
    first, last = len(SPECIALS), len(SPECIALS) + len(LETTERS)
    ids = [
        rng.integers(first, last, size).tolist() for size in rng.integers(2, 7, count)
    ]
    # What the template writes around an answer is sampled, too, by whom it has taught.
    space = made.convert_tokens_to_ids("Ġ" if kind == "bytes" else "▁")
    around = [space] if template == "llama2" else []
    if around:
        ids = [[*around, *x, made.convert_tokens_to_ids("a")] for x in ids]
    ended = [*around, stops[0]], [*around, stops[-1]]
    ids = [x + ended[i % 2] * (i % 3 > 0) for i, x in enumerate(ids)]
    asked = [prompt.tokens.tolist() for prompt in prompts]
    texts = generate.continuations(made, asked, ids, stops)
    return rewards.samples_of(prompts, ids, texts, made, stops)


def _turn(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


def pair_rows(samples: rewards.Samples) -> list[dict]:
    """Each completion as the chosen side of a pair."""
    rows, spaces = [], samples.tokenizer.chat_template == TEMPLATES["llama2"]
    for row, text in zip(samples.rows, samples.completions, strict=True):
        if spaces:  # the template writes them again
            text = text.removeprefix(" ").removesuffix(" ")
        chosen, rejected = text, text + "x"
        if isinstance(row["prompt"], list):
            chosen = [_turn(text, "assistant")]
            rejected = [_turn(text + "x", "assistant")]
        rows.append(row | {"chosen": chosen, "rejected": rejected})
    return rows


def pair_scores(scorer: Pretrained, rows: list[dict], **options) -> np.ndarray:
    """Scores of the chosen sides, by the batches and the pass of training."""
    pairs, _ = data.preference_examples(
        rows, scorer.tokenizer, max_length=64, **options
    )
    batch = data.collate_preferences(pairs, 64)
    model, params, _ = scorer
    score = jax.jit(forward.pair_rewards, static_argnums=0)
    return np.asarray(score(model, params, batch)[0])[:, 0]


def all_scores(kind: str, template: str, folder, count: int = 64):
    """(place -> float32 [count], the samples, the exported reward model)."""
    samples = sample(kind, template, count)
    rows = pair_rows(samples)
    # As `jalign reward` prepares and exports.
    made = tokenizer(kind, template)
    data.special_tokens.settle_pad_token(made)
    model = models.Model(config_of(made)).with_scalar_head()
    params = model.init(jax.random.key(0))
    data.end_template_at_turn(made)
    models.save(folder, model, params, made)
    exported = load_pretrained(folder, head="scalar")
    reward = rewards.model_reward(*exported)
    scores = {
        "training": pair_scores(Pretrained(model, params, made), rows),
        "eval": pair_scores(exported, rows, keep_tail=True),
        "rollout": rewards.reward_of(reward, samples),
        "texts": reward(samples.prompts, samples.completions, samples.rows),
    }
    return scores, samples, exported
