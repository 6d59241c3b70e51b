"""The examples of docs/huggingface.md, run one after another on the README's run."""

import re

from tests.conftest import ROOT
from tests.integration.test_readme import blocks, shell


def test_the_examples_work_and_agree(tmp_path):
    write, train, _ = blocks("Your own data")
    shell(write + train, tmp_path)
    page = (ROOT / "docs" / "huggingface.md").read_text()
    printed = []
    for language, code in re.findall(
        r"^```(bash|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE
    ):
        script = code if language == "bash" else f"python - <<'END'\n{code}END\n"
        printed.append(shell("export HF_HUB_OFFLINE=1\n" + script, tmp_path).strip())
    exported, transformers, predicted, _, ctranslate2, imported = printed
    assert exported.endswith("tickets-student: step 20")
    label = re.search(r'"label": "(.*?)"', predicted)[1]
    assert transformers.startswith(f"['{label}', '")
    assert ctranslate2 == f"['{label}']"
    assert f'"label": "{label}"' in imported
