"""What every test needs: assertions of the kits show what they compared."""

import pytest

pytest.register_assert_rewrite("tests.kits")
