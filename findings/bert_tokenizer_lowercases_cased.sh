#!/usr/bin/env bash
# transformers 5.23.0: a folder has a WordPiece tokenizer.json whose BertNormalizer says lowercase=false, and a
# tokenizer_config.json with "tokenizer_class": "BertTokenizer" and no do_lower_case. AutoTokenizer replaces the
# normalizer by the class's defaults, and lower-cases. The `tokenizers` library follows the file.
# Seen: tokenizers: ['Berlin'], transformers: ['berlin'], normalizer lowercase=True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 tokenizers==0.23.3 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import json, os
import tokenizers, transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

os.mkdir("cased")
words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "Berlin", "berlin"]
raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
raw.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
raw.save("cased/tokenizer.json")
with open("cased/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "pad_token": "[PAD]", "mask_token": "[MASK]"}, file)
by_file = Tokenizer.from_file("cased/tokenizer.json").encode("Berlin", add_special_tokens=False).tokens
loaded = transformers.AutoTokenizer.from_pretrained("cased")
by_class = loaded.tokenize("Berlin")
lower = json.loads(loaded.backend_tokenizer.to_str())["normalizer"]["lowercase"]
print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}: tokenizers: {by_file}, "
      f"transformers: {by_class}, normalizer lowercase={lower}")
raise SystemExit(0 if by_file == ["Berlin"] and by_class == ["berlin"] else 1)
PY
