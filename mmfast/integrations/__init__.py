"""Make the modules inside other libraries' models run on mmfast: ``patch(model)``.

One file per library, listed in :mod:`mmfast.integrations.patching`. None of these libraries is
imported here: what was not imported already cannot be in a model.
"""

from mmfast.integrations.attention import AttentionReport, patch_attention
from mmfast.integrations.patching import patch, unpatch
from mmfast.integrations.report import PatchReport

__all__ = ["AttentionReport", "PatchReport", "patch", "patch_attention", "unpatch"]
