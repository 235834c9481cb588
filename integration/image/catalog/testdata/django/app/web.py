# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import JsonResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=['*'],
    DATABASES={'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': '/tmp/db.sqlite3'}},
    INSTALLED_APPS=['django.contrib.auth', 'django.contrib.contenttypes'],
    ROOT_URLCONF=__name__,
    SECRET_KEY='for this image alone',
)

urlpatterns = [path('', lambda request: JsonResponse({'hello': 'from django'}))]

if __name__ == '__main__':
    execute_from_command_line(sys.argv)
