-- Copyright The nhybrid Authors.
-- SPDX-License-Identifier: Apache-2.0
CREATE USER IF NOT EXISTS 'root'@'%';
GRANT ALL ON *.* TO 'root'@'%' WITH GRANT OPTION;
