"""Tiny random text encoders and their tokenizers, from the libraries' own classes; nothing is downloaded."""

import functools
import string
import tempfile
from pathlib import Path

import sentencepiece
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

FASHION = Path(__file__).resolve().parent.parent / "assets" / "fashion_sd"


def clip_tokenizer():
    """The embedded pipeline's tokenizer: 619 tokens, 24 per prompt."""
    return CLIPTokenizer.from_pretrained(FASHION / "tokenizer")


def t5_tokenizer():
    """A unigram tokenizer of single letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits]
    return T5TokenizerFast(vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)], extra_ids=0)


def clip(kind=CLIPTextModel, width=8, length=None):
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length or tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def t5(width=20, vocabulary=80):
    config = T5Config(vocab_size=vocabulary, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def umt5(width=20):
    config = UMT5Config(vocab_size=80, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}{% endif %} {% endfor %}"
)
WORDS = "a an the of photo red blue green boot sneaker bag coat shirt sandal dress system user assistant".split()


def word_tokenizer(padding_side="right"):
    """A language model's tokenizer: words and signs, most of them unknown, and a template for messages."""
    words = ["<pad>", "<eos>", "<unk>", "<bos>", *WORDS, *string.punctuation]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side=padding_side,
        model_max_length=2048,
        chat_template=CHAT,
    )


LANGUAGE = {"vocab_size": 64, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def gemma2(width=8):
    config = Gemma2Config(**LANGUAGE, hidden_size=width, num_hidden_layers=2, head_dim=4, sliding_window=64)
    return Gemma2Model(config).eval()


def qwen3(width=8, layers=2):
    config = Qwen3Config(**LANGUAGE, hidden_size=width, num_hidden_layers=layers, head_dim=4)
    return Qwen3ForCausalLM(config).eval()


def glm(width=8):
    config = GlmConfig(**LANGUAGE, hidden_size=width, num_hidden_layers=2, head_dim=4, pad_token_id=0)
    return GlmModel(config).eval()


def llama(width=8, layers=2):
    config = LlamaConfig(**LANGUAGE, hidden_size=width, num_hidden_layers=layers, head_dim=4)
    config._attn_implementation = "eager"  # as the pipeline asks for attention maps
    return LlamaForCausalLM(config).eval()


def qwen2_5_vl(width=16):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**LANGUAGE, "hidden_size": width, "num_hidden_layers": 3, "rope_parameters": rope, "head_dim": width // 2}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def mistral3(width=8, layers=30):
    text = {**LANGUAGE, "model_type": "mistral", "hidden_size": width, "num_hidden_layers": layers, "head_dim": 4}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "head_dim": 4,
    }
    config = Mistral3Config(text_config=text, vision_config=vision)
    return Mistral3ForConditionalGeneration(config).eval()


def bert_tokenizer():
    """Words; Hunyuan-DiT reads 77 of them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=77)


def bert(width=8):
    config = BertConfig(
        vocab_size=64, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return BertModel(config).eval()


def byt5_tokenizer():
    """Bytes; nothing to choose."""
    return ByT5Tokenizer()


def chatglm(width=8, heads=2):
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=400,
        hidden_size=width,
        ffn_hidden_size=16,
        kv_channels=width // heads,
        num_attention_heads=heads,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        add_bias_linear=False,
        rmsnorm=True,
        apply_residual_connection_post_layernorm=False,
        post_layer_norm=True,
        original_rope=True,
    )
    made = ChatGLMModel(config).eval()
    for parameter in made.parameters():  # which it leaves as the memory was
        nn.init.normal_(parameter, std=0.5)
    return made


@functools.cache
def sentencepiece_model():
    """A folder with a SentencePiece model of letters, trained on the words above; it is there until Python ends."""
    folder = tempfile.TemporaryDirectory()
    with (Path(folder.name) / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(WORDS),
            model_writer=file,
            vocab_size=40,
            model_type="char",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return folder


def chatglm_tokenizer():
    """Letters; it reads its file again when it is saved."""
    return ChatGLMTokenizer(str(Path(sentencepiece_model().name) / "tokenizer.model"))
