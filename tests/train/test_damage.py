"""What is damage and what is not; tests/train/test_checkpoint.py has the whole way."""

import errno

import pytest

from jalign.train.integrity import check_readable


def test_a_missing_file_is_damage_and_a_cause_further_down_is_found(tmp_path):
    check_readable(tmp_path, FileNotFoundError(errno.ENOENT, "gone"))
    check_readable(tmp_path, ValueError("DATA_LOSS: checksum [OS error 2: ENOENT]"))
    try:
        try:
            raise OSError(errno.EIO, "I/O error")
        except OSError as error:
            raise ValueError("something else") from error
    except ValueError as error:
        with pytest.raises(OSError, match="I/O error") as found:
            check_readable(tmp_path, error)
        assert found.value.filename == str(tmp_path)
