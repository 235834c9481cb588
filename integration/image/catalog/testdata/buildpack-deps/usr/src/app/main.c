/*
 * Copyright The nhybrid Authors.
 * SPDX-License-Identifier: Apache-2.0
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void)
{
	char *hello = strdup("hello from c");

	if (!hello)
		return EXIT_FAILURE;
	puts(hello);
	free(hello);
	return EXIT_SUCCESS;
}
