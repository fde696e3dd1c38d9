"""transformers is imported only when asked for."""

import subprocess
import sys


def test_flexmsa_alone_does_not_import_transformers():
    code = "import sys, flexmsa; print('transformers' in sys.modules or 'flexmsa.integrations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
