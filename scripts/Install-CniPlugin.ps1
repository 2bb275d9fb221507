# Windows is not offered: the plug-ins are Linux programs, and nothing here installs anything on Windows.
# On Linux use install-cni-plugin.sh.
[Console]::Error.WriteLine("Install-CniPlugin.ps1: the azure-vnet CNI plug-in is not offered for Windows; use install-cni-plugin.sh on Linux.")
exit 1
