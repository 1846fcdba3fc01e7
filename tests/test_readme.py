"""The README's code runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_strategy_works_alone_in_a_plain_script(tmp_path: Path) -> None:
    """No Hydra, no launcher of ours: Lightning starts the other processes itself."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (tmp_path / "script.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "`Trainer.fit` stopped: `max_steps=8` reached." in result.stderr
    assert list(tmp_path.rglob("*.ckpt/.metadata")), "Lightning's default checkpoint is one of our directories"
