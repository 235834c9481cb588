#!/usr/bin/env Rscript
# Copyright The nhybrid Authors.
# SPDX-License-Identifier: Apache-2.0

library(stats)
library(utils)
library(methods)
library(MASS)
library(lattice)
library(Matrix)

fit <- lm(mpg ~ wt, data = mtcars)
stopifnot(length(coef(fit)) == 2)
m <- Matrix(diag(3), sparse = TRUE)
cat("hello from", tolower("R"), sum(m), "\n")
