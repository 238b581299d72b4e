"""One report, several views: what was asked, what was chosen and why, what was measured."""
