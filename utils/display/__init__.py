"""Dashboard, pictures, reports, commands to paste. The folder imports utils.core."""

# Live:     live_dashboard (what a run shows in visdom), dashboard_panes (its panes as data), visdom_client (sends
#           them), visdom_assets (scripts of visdom's page; experiments/dashboard.py starts the server)
# Later:    saved_run (a run's folder), run_files (one file of it), report (report.html), report_plots (its plots)
# Both:     curves (points, thinned and smoothed), html (templates/), commands (command lines to paste)
# Pictures: images (from tensors), grids (sheets, strips, animations)
