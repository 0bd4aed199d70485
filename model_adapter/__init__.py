"""Memory³ on Hugging Face models: writes explicit memories and reads them while it generates.

db = create_database("facts.memdb")            # or open_database
db.insert("The harbour master of Veldmoor is Ottoline Brask.")
print(generate("Who is the harbour master of Veldmoor?", db).text)
"""

import os
import sys

import lazy_loader

if "torch" not in sys.modules:
    # Threads that wait for the others of a step sleep. By default they spin, and beside other
    # programs that costs most of the speed (benchmarks/busy.py). Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The names are in __init__.pyi. Each is imported when it is first asked for: torch and transformers
# take seconds, and a query needs neither.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
