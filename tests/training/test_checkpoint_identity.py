"""What makes a checkpoint another run's."""

import json

import pytest

from immiscible.errors import UserError
from immiscible.training.checkpoints import STATE_FILE, check_identity


def test_a_checkpoint_older_than_a_flag_was_trained_by_the_flags_default(tmp_path):
    (tmp_path / STATE_FILE).write_text(json.dumps({"step": 1, "identity": {"--old": 1, "data": "digits"}, "files": {}}))
    defaults = {"--old": 2, "--new": 0.0, "--free": 3}
    check_identity(tmp_path, {"--old": 1, "--new": 0.0, "data": "digits"}, defaults)
    with pytest.raises(UserError, match=r"another run: --new was 0.0, is now 0.5. Give"):
        check_identity(tmp_path, {"--old": 1, "--new": 0.5, "data": "digits"}, defaults)
    with pytest.raises(UserError, match=r"another run: --old was 1, is now 2. Give"):
        check_identity(tmp_path, {"--old": 2, "--new": 0.0, "data": "digits"}, defaults)
