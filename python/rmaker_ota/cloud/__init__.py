"""The job service: images, jobs and their life, for development and self-hosting.

It plays the cloud's part of the RainMaker OTA protocol over any MQTT broker. `service.CloudService` runs all of it:

======== ==========================================================================================
config   what ``cloud.toml`` says
store    SQLite: images, jobs, where each node of a job stands, every report with its time
images   the image files themselves, named by their SHA-256
jobs     the rules: which job a node is offered, what a report changes
mqtt     topics and broker connection
http     images over HTTPS behind expiring URLs; the admin API the command line talks to
ca       a development certificate authority: server and node certificates
======== ==========================================================================================

Only ``http`` and ``service`` need aiohttp (``pip install 'rmaker-ota[cloud]'``); nothing is imported before it is used.
"""
