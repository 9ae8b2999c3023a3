"""Results as pages: one HTML file each, plots as inline SVG; no network, no build step."""
